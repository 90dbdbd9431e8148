// The Python module of the extension. Python passes the schemas and contracts of the ops, so they are stated once.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/amx.h"
#include "../cpu/isa.h"
#include "../cpu/pool.h"
#include "build_info.h"
#include "registry.h"

namespace qk {
namespace {

// One candidate for the calls of an op: the op that would serve them; an op that says whether it takes a call (absent:
// it takes all); and the most rows that the first argument may have (absent: any number).
struct Stage {
  c10::OperatorHandle op;
  std::optional<c10::OperatorHandle> serves;
  std::optional<int64_t> rows;
};
using StageNames = std::tuple<std::string, std::optional<std::string>, std::optional<int64_t>>;

// Passes each call to the first stage that takes it. It works on a stack of arguments, so one class serves every op,
// and choosing does not enter Python. Stages run below autograd, as the choice does.
class Choice final : public c10::OperatorKernel {
 public:
  Choice(std::vector<Stage> stages, c10::DispatchKey key) : stages_(std::move(stages)), key_(key) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) const {
    const size_t arguments = op.schema().arguments().size();
    for (const Stage& stage : stages_)
      if (takes(stage, torch::jit::last(*stack, arguments))) return stage.op.redispatchBoxed(key_, stack);
    TORCH_CHECK(false, "no backend takes this call of ", op.schema().name());
  }

 private:
  bool takes(const Stage& stage, at::ArrayRef<c10::IValue> arguments) const {
    if (stage.rows) {
      const at::Tensor& t = arguments[0].toTensor();
      if (t.dim() > 0 && c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)) > *stage.rows) return false;
    }
    if (!stage.serves) return true;
    // The outputs, which are the last arguments, are not passed.
    const auto inputs = arguments.slice(0, stage.serves->schema().arguments().size());
    torch::jit::Stack asked(inputs.begin(), inputs.end());
    stage.serves->redispatchBoxed(key_, &asked);
    return asked.front().toBool();
  }

  std::vector<Stage> stages_;
  c10::DispatchKeySet key_;
};

// Implements an op of a namespace by a choice between other ops.
void choose(const std::string& ns, const std::string& op, c10::DispatchKey key, const std::vector<StageNames>& names) {
  const auto found = [](const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  };
  std::vector<Stage> stages;
  for (const auto& [served, serves, rows] : names)
    stages.push_back({found(served), serves ? std::optional(found(*serves)) : std::nullopt, rows});
  auto kernel = c10::BoxedKernel::makeFromFunctor(std::make_unique<Choice>(std::move(stages), key));
  library(torch::Library::IMPL, ns, key).impl(op.c_str(), torch::CppFunction::makeFromBoxedKernel(std::move(kernel)));
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = QK_VERSION;
  info["torch"] = QK_TORCH_VERSION;
  info["cxx_compiler"] = QK_CXX_COMPILER;
  info["cuda_compiler"] = QK_CUDA_COMPILER;
  info["cuda_archs"] = QK_CUDA_ARCHS;
  info["isas"] = cpu::compiled_isas();
  info["isa"] = cpu::name_of(cpu::isa());
  info["tiles"] = cpu::name_of(cpu::tiles());
  return info;
}

}  // namespace
}  // namespace qk

PYBIND11_MODULE(_C, m) {
  m.def("state", &qk::state, "State the contract of an op: its name, its schema without outputs, and the text.");
  m.def("declare", &qk::declare, "Declare an op by its schema in a namespace of the extension, implemented.");
  m.def("trained", &qk::trained, "The ops that have a form with gradients in C++.");
  m.def("declare_trained", &qk::declare_trained,
        "Declare the form of an op with gradients in C++, by a schema with the arguments of the op.");
  m.def("declare_check", &qk::declare_check,
        "For tests: declare an op that only checks its arguments by the contract that was stated for its name.");
  m.def(
      "implement",
      [](const std::string& ns, const std::string& op, const std::string& device) {
        qk::implement(ns, op, c10::parseDispatchKey(device));
      },
      "Serve an op of a namespace on a device (\"CPU\" or \"CUDA\") with this extension's kernel.");
  m.def(
      "choose",
      [](const std::string& ns, const std::string& op, const std::string& device,
         const std::vector<qk::StageNames>& stages) { qk::choose(ns, op, c10::parseDispatchKey(device), stages); },
      "Serve each call of an op of a namespace on a device by the first op of a list that takes it. Of each: its name, "
      "the name of the op that says whether it takes a call or None, the most rows of the first argument or None.");
  m.def(
      "serves",
      [](const std::string& op, const std::string& device) { return qk::serves(op, c10::parseDispatchKey(device)); },
      "Whether this build has a kernel for an op on a device.");
  m.def("has_isa", &qk::cpu::has_isa, "Whether this machine runs one of the compiled ISAs.");
  m.def("use_isa", &qk::cpu::use_isa, pybind11::arg("isa"),
        "For tests: use the kernels of a named ISA from now on, and return the name of the former one.");
  m.def("use_tiles", &qk::cpu::use_tiles, pybind11::arg("tiles"),
        "For tests: multiply by \"amx\" (if this machine has it), \"portable\" tiles or \"none\" from "
        "now on, and return what was used.");
  m.def("build_info", &qk::build_info, "Compilers, ISAs, CUDA architectures and versions of this build.");
  m.def("empty_cache", &qk::cpu::pool_clear, "Return the memory kept for reuse to the system.");
  m.def("cached_bytes", &qk::cpu::pool_cached_bytes, "Bytes kept for reuse.");
}
