// Two ops with their gradients in C++. A training step calls them for every layer, and an autograd Function in Python
// would add its own time to each of these calls.
//
// Python has the rules for everything (qatkernels/ops/_autograd.py), and uses these forms only where gradients are all
// that is needed at the time of the call: no forward mode, no transform of torch.func, no compilation. If something of
// that kind is active later, when the backward runs, or a graph of the backward is asked for, the backward is Python's:
// the op fake_quantize_backward_differentiable. (torch.func.jvp of a backward whose forward ran outside of it is an
// error: NotImplementedError.)
#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "registry.h"

namespace qk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kNames[] = {"grid", "noise_std", "scale_noise_std", "grad_scale"};

// Whether a transform of torch.func is active. Torch installs no header that counts them, only a check that throws.
bool in_transform() {
  const auto& state = at::functorch::functorchTLSAccessor();
  if (!state) return false;
  try {
    state->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

class FakeQuantize final : public torch::autograd::Function<FakeQuantize> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point,
                        const OptionalTensor& seed, at::ArrayRef<double> grid, double noise_std, double scale_noise_std,
                        double grad_scale, std::optional<at::ScalarType> dtype) {
    using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             at::ArrayRef<double>, double, double, double, std::optional<at::ScalarType>);
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("qatkernels::fake_quantize", "").typed<Signature>();
    const at::AutoDispatchBelowAutograd below;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({w, scale, zero_point.value_or(Tensor()), seed.value_or(Tensor())});
    ctx->saved_data[kNames[0]] = grid;
    ctx->saved_data[kNames[1]] = noise_std;
    ctx->saved_data[kNames[2]] = scale_noise_std;
    ctx->saved_data[kNames[3]] = grad_scale;
    return op.call(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale, dtype);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list found(9);  // as many as forward has arguments
    if (!grads[0].defined()) return found;
    const variable_list saved = ctx->get_saved_variables();
    const auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const std::vector<double> grid = ctx->saved_data[kNames[0]].toDoubleVector();
    const auto number = [&](int i) { return ctx->saved_data[kNames[i]].toDouble(); };
    using Signature =
        std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                           const OptionalTensor&, at::ArrayRef<double>, double, double, double);
    const auto named = [](const char* name) {
      return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
    };
    static const auto plain = named("qatkernels::fake_quantize_backward");
    static const auto differentiable = named("qatkernels::fake_quantize_backward_differentiable");
    const bool more =
        at::GradMode::is_enabled() || torch::autograd::ForwardADLevel::try_get_by_idx(0) || in_transform();
    std::optional<at::AutoDispatchBelowAutograd> below;
    if (!more) below.emplace();
    const auto& op = more ? differentiable : plain;
    std::tie(found[0], found[1], found[2]) =
        op.call(grads[0], saved[0], saved[1], given(saved[2]), given(saved[3]), grid, number(1), number(2), number(3));
    if (!saved[2].defined()) found[2] = Tensor();
    return found;
  }
};

Tensor fake_quantize_trained(const Tensor& w, const Tensor& scale, const OptionalTensor& zero_point,
                             const OptionalTensor& seed, at::ArrayRef<double> grid, double noise_std,
                             double scale_noise_std, double grad_scale, std::optional<at::ScalarType> dtype) {
  return FakeQuantize::apply(w, scale, zero_point, seed, grid, noise_std, scale_noise_std, grad_scale, dtype);
}

class FakeQuantizeDynamic final : public torch::autograd::Function<FakeQuantizeDynamic> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t bits) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("qatkernels::fake_quantize_dynamic", "")
                               .typed<Tensor(const Tensor&, int64_t)>();
    const at::AutoDispatchBelowAutograd below;
    ctx->set_materialize_grads(false);
    return op.call(x, bits);
  }

  static variable_list backward(AutogradContext*, variable_list grads) { return {grads[0], Tensor()}; }
};

Tensor fake_quantize_dynamic_trained(const Tensor& x, int64_t bits) { return FakeQuantizeDynamic::apply(x, bits); }

}  // namespace

std::vector<std::string> trained() { return {"fake_quantize", "fake_quantize_dynamic"}; }

void declare_trained(const std::string& ns, const std::string& op, const std::string& schema) {
  library(torch::Library::FRAGMENT, ns, std::nullopt)
      .def(torch::schema(schema.c_str()),
           op == "fake_quantize"
               ? torch::CppFunction::makeFromUnboxedFunction(TORCH_FN(fake_quantize_trained))
               : torch::CppFunction::makeFromUnboxedFunction(TORCH_FN(fake_quantize_dynamic_trained)));
}

}  // namespace qk
