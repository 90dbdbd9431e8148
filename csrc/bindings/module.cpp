// The extension: ops declared from schemas that Python gives, so that there is one of each.
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/pool.h"
#include "build_info.h"
#include "tensors.h"

namespace qk {
namespace {

const Ops& ops() {
  static const Ops all = [] {
    Ops made;
    add_cross_entropy(made);
    add_fake_quantize(made);
    add_grouped(made);
    add_lowbit(made);
    add_krylov(made);
    add_quant_linear(made);
    add_train(made);
    return made;
  }();
  return all;
}

bool serves(const std::string& op, c10::DispatchKey key) {
  const auto found = ops().find(op);
#if defined(QK_WITH_CUDA)
  if (key == c10::DispatchKey::CUDA) return found != ops().end() && found->second.cuda;
#endif
  return found != ops().end() && key == c10::DispatchKey::CPU && found->second.cpu;
}

// Registrations live as long as the process, as those of TORCH_LIBRARY do.
torch::Library& library(torch::Library::Kind kind, const std::string& ns, std::optional<c10::DispatchKey> key) {
  static auto& libraries = *new std::vector<std::unique_ptr<torch::Library>>;
  libraries.push_back(std::make_unique<torch::Library>(kind, ns, key, __FILE__, __LINE__));
  return *libraries.back();
}

void implement(const std::string& ns, const std::string& op, c10::DispatchKey key) {
  TORCH_CHECK(serves(op, key), "this build has no kernel for ", op, " on ", key);
  library(torch::Library::IMPL, ns, key).impl(op.c_str(), ops().at(op).make());
}

// Declares an op by its schema in a namespace of this extension's own and implements it on every device built for.
void declare(const std::string& ns, const std::string& op, const std::string& schema) {
  library(torch::Library::FRAGMENT, ns, std::nullopt).def(torch::schema(schema.c_str()));
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA})
    if (serves(op, key)) implement(ns, op, key);
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = QK_VERSION;
  info["torch"] = QK_TORCH_VERSION;
  info["cxx_compiler"] = QK_CXX_COMPILER;
  info["cuda_compiler"] = QK_CUDA_COMPILER;
  info["cuda_archs"] = QK_CUDA_ARCHS;
  info["isas"] = compiled_isas();
  info["isa"] = kernels().isa;
  return info;
}

}  // namespace
}  // namespace qk

PYBIND11_MODULE(_C, m) {
  m.def("declare", &qk::declare, "Declare an op by its schema in a namespace of the extension, implemented.");
  m.def(
      "implement",
      [](const std::string& ns, const std::string& op, const std::string& device) {
        qk::implement(ns, op, c10::parseDispatchKey(device));
      },
      "Serve an op of a namespace on a device (\"CPU\" or \"CUDA\") with this extension's kernel.");
  m.def(
      "serves",
      [](const std::string& op, const std::string& device) { return qk::serves(op, c10::parseDispatchKey(device)); },
      "Whether this build has a kernel for an op on a device.");
  m.def("has_isa", &qk::has_isa, "Whether this machine runs one of the compiled ISAs.");
  m.def("use_isa", &qk::use_isa, pybind11::arg("isa"),
        "For tests: use the kernels of a named ISA from now on, and return the name of the former one.");
  m.def("build_info", &qk::build_info, "Compilers, ISAs, CUDA architectures and versions of this build.");
  m.def("empty_cache", &qk::cpu::pool_clear, "Return the memory kept for reuse to the system.");
  m.def("cached_bytes", &qk::cpu::pool_cached_bytes, "Bytes kept for reuse.");
}
