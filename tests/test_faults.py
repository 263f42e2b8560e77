"""The list of faults that `make mutate` plants: every one is still there to be planted."""

import pytest
from faults import ROOT, all_faults

FAULTS = all_faults()
KINDS = ("cpu", "cuda", "triton", "python")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_a_fault_can_be_planted_and_names_tests(fault):
    path = ROOT / fault.file
    fault.planted(path.read_text())  # says why not
    files = [ROOT / word for word in fault.tests if word.startswith("tests/")]
    assert files and all(file.exists() for file in files)


def test_faults_are_many_and_differ():
    assert len({fault.digest for fault in FAULTS}) == len(FAULTS) >= 60
    assert all(sum(fault.kind == kind for fault in FAULTS) >= 10 for kind in KINDS)


def test_a_line_that_is_gone_or_there_twice_is_an_error():
    fault = FAULTS[0]
    for text in ("", 2 * (fault.old + "\n")):
        with pytest.raises(ValueError, match="must be there once"):
            fault.planted(text)
