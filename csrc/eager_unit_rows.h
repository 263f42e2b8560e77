// Part of eager.cpp: rows of length 1, as core/unit_rows.py makes them, operation by operation, in tasks where there
// are many.
#pragma once

#include "eager_arguments.h"
#include "eager_node.h"

namespace contrastive_ops {
namespace {

PyObject* unit_rows_again = nullptr;  // of Python: called where gradients are differentiated again

struct UnitRowsBackward : torch::autograd::Node {
  SavedVariable x, inverse;

  std::string name() const override { return "UnitRowsBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    inverse.reset_data();
  }
  variable_list apply(variable_list&& upstream) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& gradient = upstream[0];
    if (!gradient.defined()) return {Tensor()};
    const Tensor rows = x.unpack(), factor = inverse.unpack();
    if (at::GradMode::is_enabled()) {
      pybind11::gil_scoped_acquire gil;
      const auto result = call_python(unit_rows_again, Py_BuildValue("(NN)", or_none(rows), or_none(gradient)));
      return {THPVariable_Unpack(result.ptr())};
    }
    return {by_rows(rows, factor, gradient)};
  }

 private:
  static Tensor by_rows(const Tensor& rows, const Tensor& factor, const Tensor& gradient) {
    const auto type = factor.scalar_type();
    // What a row's gradient has along the row, and what is across it over its length.
    const auto find = [&](const Tensor& x, const Tensor& by, const Tensor& d) {
      const Tensor unit = at::mul(x.to(type), by), wide = d.to(type);
      const Tensor along = at::mul(unit, wide).sum(at::IntArrayRef{-1}, true);
      return std::make_pair(along, at::addcmul(wide, unit, along, -1).mul_(by));
    };
    Tensor along, found;
    const bool plain = is_plain(gradient);
    if (!plain || is_one_range(rows)) {
      std::tie(along, found) = find(rows, factor, gradient);
    } else {
      along = empty_rows(rows, 1, type), found = empty_rows(rows, rows.size(1), type);
      for_row_ranges(rows.size(0), rows.size(1), [&](auto part) {
        const auto [inner, across] = find(part(rows), part(factor), part(gradient));
        part(along).copy_(inner);
        part(found).copy_(across);
      });
    }
    // A row that nothing depends on has no gradient, whatever it holds. A transform's numbers cannot be looked at.
    if (!plain || !std::isfinite(along.sum().item<double>())) {
      found = at::where(gradient.ne(0).any(-1, true), found, at::zeros({}, found.options()));
    }
    return found.to(rows.scalar_type());
  }
};

// unit_rows(x): the rows, or None for what Python must look at.
PyObject* py_unit_rows(PyObject*, PyObject* argument) {
  HANDLE_TH_ERRORS
  Place place;
  Tensor x;
  const bool fits = kernels != nullptr && read_first(argument, place, x) && x.device().is_cpu() && is_eager(place) &&
                    x.dim() == 2 && x.numel() > 0 &&
                    (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble || is_narrow(x));
  if (!fits) Py_RETURN_NONE;
  decltype(Owner::own(std::declval<UnitRowsBackward*>())) node;
  if (at::GradMode::is_enabled() && x.requires_grad()) {
    node = Owner::own(new UnitRowsBackward());
    node->set_next_edges(torch::autograd::collect_next_edges(x));
  }
  Tensor unit, inverse;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto type = accumulator(x);
    if (is_one_range(x)) {
      const Tensor wide = x.to(type);
      inverse = inverse_lengths(wide);
      unit = at::mul(wide, inverse).to(x.scalar_type());
    } else {
      inverse = empty_rows(x, 1, type), unit = empty_rows(x, x.size(1), x.scalar_type());
      for_row_ranges(x.size(0), x.size(1), [&](auto part) {
        const Tensor wide = part(x).to(type), by = inverse_lengths(wide);
        part(inverse).copy_(by);
        part(unit).copy_(at::mul(wide, by));
      });
    }
  }
  if (node) {
    node->x = SavedVariable(x, false);
    node->inverse = SavedVariable(inverse, false);
    torch::autograd::set_history(unit, node);
  }
  return THPVariable_Wrap(unit);
  END_HANDLE_TH_ERRORS
}

}  // namespace
}  // namespace contrastive_ops
