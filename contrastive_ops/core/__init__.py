"""What every part of the package builds on; nothing here imports from the rooms above it."""
