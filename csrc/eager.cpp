// The module contrastive_ops._eager: a loss with checks, mode test and autograd in C++, on the CPU and, by
// backend="cuda", on a GPU (eager_cuda.h); and a router on the CPU (eager_route.h).
//
// `loss` returns None for whatever it does not know or would have to refuse: a traced or transformed call, another
// device, an argument that does not fit. Python then makes the same call by the operator, which words the error.
// Results have the same bits both ways. The kernels come from contrastive_ops._C, in a capsule.
#include <torch/csrc/autograd/graph_task.h>

#include <vector>

#include "eager_arguments.h"
#include "eager_cuda.h"
#include "eager_route.h"
#include "eager_unit_rows.h"

namespace contrastive_ops {
namespace {

PyObject* loss_again = nullptr;

// ---- Autograd
// ----------------------------------------------------------------------------------------------------------

struct SimilarityLossBackward : torch::autograd::Node {
  Options options;
  bool one_pass = false;
  std::array<SavedVariable, kInputs> inputs;
  // dx and those after it are formed in forward, or folds, slopes and kept are there for backward.
  SavedVariable inverse_x, inverse_y, folds, slopes, kept, dx, dy, dscale, drow_bias;
  std::unique_ptr<CudaLoss> cuda;  // on a GPU, in place of those

  std::string name() const override { return "SimilarityLossBackward"; }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& each : inputs) each.reset_data();
    for (auto* each : {&inverse_x, &inverse_y, &folds, &slopes, &kept, &dx, &dy, &dscale, &drow_bias})
      each->reset_data();
    cuda.reset();
  }
  variable_list apply(variable_list&& upstream) override;

 private:
  void sweep(const Inputs& in, const Tensor& d_loss, variable_list& out);
  void sweep_on_cuda(const Inputs& in, const Tensor& d_loss, variable_list& out);
  void finish(const Inputs& in, Tensor x_gradient, Tensor y_gradient, const Tensor& scale_gradient,
              const Tensor& bias_gradient, const Tensor& inverse_of_x, const Tensor& inverse_of_y, variable_list& out);
  variable_list again(const Inputs& in, const Tensor& d_loss);
};

// ``gradient * factor``, or the gradient itself where it may be given away.
Tensor times(const Tensor& gradient, const Tensor& factor, bool give) {
  if (!gradient.defined() || give) return gradient;
  if (gradient.dim() != 2 || is_one_range(gradient)) return at::mul(gradient, factor);
  const Tensor out = empty_rows(gradient, gradient.size(1), gradient.scalar_type());
  for_row_ranges(gradient.size(0), gradient.size(1), [&](auto part) {
    Tensor to = part(out);
    at::mul_out(to, part(gradient), factor);
  });
  return out;
}

Tensor ordered_sum(const Tensor& values) {  // as core/ordered.py
  constexpr int64_t kPart = int64_t{1} << 14;
  if (values.numel() <= kPart) return values.sum();
  std::vector<Tensor> sums;
  for (const Tensor& part : values.split(kPart)) sums.push_back(part.sum());
  return at::stack(sums).sum();
}

variable_list SimilarityLossBackward::apply(variable_list&& upstream) {
  std::lock_guard<std::mutex> lock(mutex_);
  variable_list out(kDifferentiable);
  const Tensor& d_loss = upstream[0];
  if (!d_loss.defined()) return out;
  Inputs in;
  for (int i = 0; i < kInputs; ++i) in[i] = inputs[i].unpack();
  if (at::GradMode::is_enabled()) return again(in, d_loss);
  if (cuda) {
    sweep_on_cuda(in, d_loss, out);
    return out;
  }
  if (!one_pass) {
    sweep(in, d_loss, out);
    return out;
  }
  // Whoever gets a gradient may overwrite it, so one that a kept graph needs again is copied.
  const bool give = !torch::autograd::get_current_graph_task_keep_graph() && d_loss.item<double>() == 1;
  if (in[kWeight].defined() && task_should_compute_output(kWeight)) out[kWeight] = times(slopes.unpack(), d_loss, give);
  finish(in, times(dx.unpack(), d_loss, give), times(dy.unpack(), d_loss, give), times(dscale.unpack(), d_loss, give),
         times(drow_bias.unpack(), d_loss, give), inverse_x.unpack(), inverse_y.unpack(), out);
  return out;
}

void SimilarityLossBackward::sweep(const Inputs& in, const Tensor& d_loss, variable_list& out) {
  Problem p(options, in, inverse_x.unpack(), inverse_y.unpack());
  const Tensor values = folds.unpack(), found = slopes.unpack(), products = kept.unpack();
  const Tensor scaled = at::mul(found.view({-1, p.raw.N}), d_loss);
  const int64_t bytes = p.raw.N * scaled.element_size(), terms = in[kWeight].defined() ? 1 : 0;
  if (terms && task_should_compute_output(kWeight)) out[kWeight] = scaled[0];
  if (products.defined()) {
    p.raw.kept = products.data_ptr();
    p.raw.kept_size = products.numel();
  }
  Gradients gradients(p, task_should_compute_output(kX) || (p.raw.self && task_should_compute_output(kY)),
                      task_should_compute_output(kY), task_should_compute_output(kScale),
                      task_should_compute_output(kBias));
  const char *value = static_cast<const char*>(values.data_ptr()), *slope = static_cast<const char*>(scaled.data_ptr());
  const void *of_folds[kRowFolds], *d_folds[kRowFolds];
  const int64_t* no_winners[kRowFolds]{};
  for (int f = 0; f < p.raw.fold_count; ++f) {
    of_folds[f] = value + f * bytes;
    d_folds[f] = slope + (terms + f) * bytes;
  }
  gradients.raw.values = of_folds;
  gradients.raw.d_values = d_folds;
  gradients.raw.argmax = no_winners;
  gradients.raw.d_target = slope + (terms + p.raw.fold_count) * bytes;
  without_gil([&] { kernels->similarity_reduce().backward(p.raw, gradients.raw, kernels->parallel()); });
  gradients.through_lengths(p);
  finish(in, gradients.dx, gradients.dy, gradients.dscale, gradients.drow_bias, p.inverse_x, p.inverse_y, out);
}

void SimilarityLossBackward::sweep_on_cuda(const Inputs& in, const Tensor& d_loss, variable_list& out) {
  std::array<bool, kDifferentiable> wants{};
  for (int i = 0; i < kDifferentiable; ++i) wants[i] = in[i].defined() && task_should_compute_output(i);
  const Leaving found = cuda_backward(*cuda, in, wants, d_loss);
  Tensor scale, bias;
  if (found.totals.defined() && wants[kScale]) scale = found.totals.narrow(0, 0, 1);
  if (found.totals.defined() && wants[kBias]) bias = found.totals.narrow(0, found.totals.size(0) - 1, 1);
  if (found.dx.defined()) out[kX] = found.dx;
  if (found.dy.defined()) out[kY] = found.dy;
  if (bias.defined()) out[kBias] = bias.reshape(in[kBias].sizes());
  if (scale.defined()) out[kScale] = scale.reshape(in[kScale].sizes());
}

// From gradients by what the sweep saw to those by the inputs.
void SimilarityLossBackward::finish(const Inputs& in, Tensor x_gradient, Tensor y_gradient,
                                    const Tensor& scale_gradient, const Tensor& bias_gradient,
                                    const Tensor& inverse_of_x, const Tensor& inverse_of_y, variable_list& out) {
  if (options.form == Form::stacked && x_gradient.defined()) {
    const int64_t rows = in[kX].size(0);
    y_gradient = x_gradient.narrow(0, rows, rows);
    x_gradient = x_gradient.narrow(0, 0, rows);
  }
  const auto by_rows = [&](int input, const Tensor& gradient, const Tensor& inverse) {
    if (!gradient.defined() || !task_should_compute_output(input)) return;
    const bool by_unit = options.normalize && !is_narrow(in[input]);
    const Tensor own = by_unit ? through_lengths(gradient, in[input], inverse) : gradient;
    out[input] = own.to(in[input].scalar_type());
  };
  by_rows(kX, x_gradient, inverse_of_x);
  by_rows(kY, y_gradient, inverse_of_y);
  if (scale_gradient.defined() && task_should_compute_output(kScale)) {
    Tensor total = scale_gradient[0];
    if (scale_gradient.numel() == 2) total = total + scale_gradient[1];
    if (options.inverted) {
      const Tensor factor = in[kScale].reshape({}).reciprocal();
      total = total.neg() * (factor * factor);
    }
    out[kScale] = total.reshape(in[kScale].sizes());
  }
  if (bias_gradient.defined() && task_should_compute_output(kBias)) {
    out[kBias] = ordered_sum(bias_gradient).reshape(in[kBias].sizes());
  }
}

variable_list SimilarityLossBackward::again(const Inputs& in, const Tensor& d_loss) {
  pybind11::gil_scoped_acquire gil;
  const Options& o = options;
  PyObject* tensors = PyTuple_New(kInputs);
  for (int i = 0; i < kInputs; ++i) PyTuple_SET_ITEM(tensors, i, or_none(in[i]));
  PyObject* arguments =
      Py_BuildValue("(NNiiiOOddL)", tensors, or_none(d_loss), static_cast<int>(o.kind), static_cast<int>(o.form),
                    static_cast<int>(o.reduction), o.normalize ? Py_True : Py_False, o.inverted ? Py_True : Py_False,
                    o.number, o.bias_number, static_cast<long long>(o.memory_budget));
  const auto result = call_python(loss_again, arguments);
  variable_list out(kDifferentiable);
  for (int i = 0; i < kDifferentiable; ++i) {
    PyObject* each = PyTuple_GetItem(result.ptr(), i);
    if (each != nullptr && each != Py_None) out[i] = THPVariable_Unpack(each);
  }
  return out;
}

// ---- Forward
// -----------------------------------------------------------------------------------------------------------

Tensor forward(const Options& o, const Inputs& in, const Place& place) {
  std::array<bool, kDifferentiable> wants{};
  bool any = false;
  if (at::GradMode::is_enabled()) {
    for (int i = 0; i < kDifferentiable; ++i) any |= wants[i] = in[i].defined() && in[i].requires_grad();
  }
  Owned<SimilarityLossBackward> node;
  if (any) {
    node = Owner::own(new SimilarityLossBackward());
    node->set_next_edges(torch::autograd::collect_next_edges(in[kX], in[kY], in[kScale], in[kBias], in[kWeight]));
    node->options = o;
  }
  Tensor result;
  if (place.by_cuda) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto loss = std::make_unique<CudaLoss>(o, in);
    result = cuda_forward(*loss, in, wants, any);
    if (node) {
      for (int i = 0; i < kInputs; ++i) save(node->inputs[i], in[i]);
      node->cuda = std::move(loss);
    }
  } else {
    at::AutoDispatchBelowADInplaceOrView guard;
    Problem p(o, in);
    const bool swept = wants[kX] || wants[kY] || wants[kScale] || wants[kBias];
    const bool one_pass = swept && in_one_pass(o.kind, o.reduction, p.raw.self), two_pass = any && !one_pass;
    const int64_t N = p.raw.N, of_folds = N * p.raw.fold_count;
    SimilarityLoss loss{};
    loss.kind = o.kind;
    loss.reduction = o.reduction;
    const Tensor weight = in[kWeight].defined() ? in[kWeight].contiguous() : Tensor();
    const bool weighted = any && weight.defined();
    loss.weight = weight.defined() ? weight.data_ptr() : nullptr;
    loss.count = p.count.defined() ? p.count.data_ptr() : nullptr;
    result = o.reduction == Reduction::none ? p.empty(N) : at::empty({}, p.x.options().dtype(p.type));
    loss.loss = result.data_ptr();
    const Tensor folds = one_pass ? Tensor() : p.empty(of_folds);
    if (!one_pass) loss.folds = folds.data_ptr();
    Tensor slopes, kept;
    if (weighted || two_pass) {
      slopes = p.empty((weighted ? N : 0) + (two_pass ? of_folds + N : 0));
      char* at = static_cast<char*>(slopes.data_ptr());
      const auto bytes = slopes.element_size();
      if (weighted) loss.d_weight = at;
      at += weighted ? N * bytes : 0;
      if (two_pass) loss.d_folds = at;
      if (two_pass) loss.d_target = at + of_folds * bytes;
    }
    if (two_pass && swept) {
      const int64_t size = kept_size_of(o, p.raw, result.element_size());
      if (size) {
        kept = p.empty(size);
        p.raw.kept = kept.data_ptr();
        p.raw.kept_size = size;
      }
    }
    Gradients gradients(p, one_pass && wants[kX], one_pass && wants[kY], one_pass && wants[kScale],
                        one_pass && wants[kBias]);
    loss.gradients = gradients.raw;
    without_gil([&] { similarity_loss_cpu(p.raw, loss, one_pass, kernels->similarity_reduce(), kernels->parallel()); });
    gradients.through_lengths(p);
    if (node) {
      node->one_pass = one_pass;
      for (int i = 0; i < kInputs; ++i) save(node->inputs[i], in[i]);
      save(node->inverse_x, p.inverse_x);
      save(node->inverse_y, p.inverse_y);
      save(node->folds, two_pass ? folds : Tensor());
      save(node->slopes, slopes);
      save(node->kept, kept);
      save(node->dx, gradients.dx);
      save(node->dy, gradients.dy);
      save(node->dscale, gradients.dscale);
      save(node->drow_bias, gradients.drow_bias);
    }
  }
  if (node) torch::autograd::set_history(result, node);
  return result;
}

// loss(kind, form, x, y, scale, temperature, default_temperature, bias, target, labels, col_labels, weight, reduction,
// normalize, memory_budget, backend)
PyObject* py_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 16) {
    PyErr_SetString(PyExc_TypeError, "loss takes 16 arguments");
    return nullptr;
  }
  HANDLE_TH_ERRORS
  Options o{};
  Inputs in;
  Place place;
  o.kind = static_cast<RowLoss>(PyLong_AsLong(arguments[0]));
  o.form = static_cast<Form>(PyLong_AsLong(arguments[1]));
  o.normalize = arguments[13] == Py_True;
  const bool known = level_is_known() && (o.normalize || arguments[13] == Py_False) &&
                     read_first(arguments[2], place, in[kX]) && is_eager(place) &&
                     read_tensor(arguments[3], place, in[kY]) && read_backend(arguments[15], place) &&
                     matrices_fit(o, in[kX], in[kY]) && read_reduction(arguments[12], o.reduction) &&
                     read_budget(arguments[14], place, o.memory_budget);
  if (!known) Py_RETURN_NONE;
  const auto type = accumulator(in[kX]);
  o.has_bias = arguments[7] != Py_None;
  const bool fits = read_scale(arguments[4], arguments[5], arguments[6], place, type, o, in[kScale]) &&
                    (!o.has_bias || read_number(arguments[7], place, type, o.bias_number, in[kBias])) &&
                    read_tensor(arguments[8], place, in[kTarget]) && read_tensor(arguments[9], place, in[kLabels]) &&
                    read_tensor(arguments[10], place, in[kColLabels]) &&
                    read_tensor(arguments[11], place, in[kWeight]) && rows_fit(o, in) &&
                    (!place.by_cuda || fits_on_cuda(o, in));
  if (!fits) Py_RETURN_NONE;
  try {
    return THPVariable_Wrap(forward(o, in, place));
  } catch (const c10::OutOfMemoryError&) {  // Python goes on with smaller chunks
    Py_RETURN_NONE;
  }
  END_HANDLE_TH_ERRORS
}

// connect(capsule of the kernels): true, or false where they were built from other sources.
PyObject* py_connect(PyObject*, PyObject* capsule) {
  const void* found = PyCapsule_GetPointer(capsule, kKernelsCapsule);
  if (found == nullptr) return nullptr;
  const auto* given = static_cast<const Kernels*>(found);
  if (given->layout != kKernelsLayout) Py_RETURN_FALSE;
  kernels = given;
  Py_RETURN_TRUE;
}

// differentiate_again(name of a function here, what it calls where its gradients are differentiated again)
PyObject* py_differentiate_again(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const char* name = count == 2 && PyUnicode_Check(arguments[0]) ? PyUnicode_AsUTF8(arguments[0]) : "";
  if (name == nullptr) return nullptr;
  PyObject** to = std::strcmp(name, "loss") == 0        ? &loss_again
                  : std::strcmp(name, "route") == 0     ? &route_again
                  : std::strcmp(name, "unit_rows") == 0 ? &unit_rows_again
                                                        : nullptr;
  if (to == nullptr) {
    PyErr_SetString(PyExc_TypeError, "differentiate_again takes loss, route or unit_rows, and a function");
    return nullptr;
  }
  Py_XDECREF(*to);
  *to = Py_NewRef(arguments[1]);
  Py_RETURN_NONE;
}

// on_host(address of CudaKernels, or 0): from now on they run backend="cuda" for tensors on the CPU. For tests.
PyObject* py_on_host(PyObject*, PyObject* address) {
  const auto* given = static_cast<const CudaKernels*>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  host_kernels = given;
  Py_RETURN_NONE;
}

// A function of Python with positional arguments, as a method table has it.
template <class Function>
PyCFunction fast(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef functions[] = {{"loss", fast(py_loss), METH_FASTCALL, nullptr},
                           {"route", fast(py_route), METH_FASTCALL, nullptr},
                           {"unit_rows", py_unit_rows, METH_O, nullptr},
                           {"connect", py_connect, METH_O, nullptr},
                           {"differentiate_again", fast(py_differentiate_again), METH_FASTCALL, nullptr},
                           {"on_host", py_on_host, METH_O, nullptr},
                           {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_eager", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace contrastive_ops

PyMODINIT_FUNC PyInit__eager() {
  PyObject* module = PyModule_Create(&contrastive_ops::definition);
#ifdef Py_GIL_DISABLED
  if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);  // `connect` is called at import
#endif
  if (module != nullptr) PyModule_AddStringConstant(module, "torch", CONTRASTIVE_OPS_TORCH_VERSION);
  return module;
}
