// The table of kernels. Kernels register themselves in it, and from it become implementations of ops.
//
// A kernel is a function of the arguments of an op, then of its outputs, which it writes. Before it is called,
// arguments and outputs are checked by the op's contract, and arguments are made contiguous (except those that the
// contract calls strided). So a kernel does not check them again.
#pragma once

#include <torch/library.h>

#include <string>
#include <vector>

namespace qk {

// Adds a kernel to the table when the library is loaded.
struct KernelEntry {
  KernelEntry(const char* op, c10::DispatchKey key, c10::KernelFunction kernel);
};

#define QK_KERNEL_ENTRY(op, function, key)                                                       \
  static const ::qk::KernelEntry op##_##key##_entry {                                            \
    #op, c10::DispatchKey::key, c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(function)) \
  }
// A kernel `op` of this file, for the CPU or for both devices.
#define QK_CPU_KERNEL(op) QK_KERNEL_ENTRY(op, op, CPU)
#if defined(QK_WITH_CUDA)
#define QK_CUDA_KERNEL(op, function) QK_KERNEL_ENTRY(op, function, CUDA)
#define QK_KERNEL(op) \
  QK_CPU_KERNEL(op);  \
  QK_CUDA_KERNEL(op, op)
#else
#define QK_KERNEL(op) QK_CPU_KERNEL(op)
#endif

// Whether the table has a kernel for an op of torch.ops: `<op>`; `<op>_out`, which has the outputs at the end of its
// arguments; or `<op>_serves`, which says whether a kernel that takes only some calls takes this one.
bool serves(const std::string& name, c10::DispatchKey key);
// States the contract of an op, before it is declared or implemented.
void state(const std::string& op, const std::string& schema, const std::string& contract);
// Implements an op of a namespace on a device by its kernel.
void implement(const std::string& ns, const std::string& name, c10::DispatchKey key);
// Declares an op in a namespace of the extension's own and implements it on every device that has the kernel.
void declare(const std::string& ns, const std::string& name, const std::string& schema);
// The ops that have a form with gradients in C++ (trained.cpp), and the declaration of such a form by a schema with the
// arguments of the op.
std::vector<std::string> trained();
void declare_trained(const std::string& ns, const std::string& op, const std::string& schema);
// For tests: declares an op that only checks its arguments, on a CPU, by the contract that was stated for its name. Its
// schema ends in "-> str": it returns a line for each output, "name: dtype shape".
void declare_check(const std::string& ns, const std::string& name, const std::string& schema);

// Registrations live as long as the process, as those of TORCH_LIBRARY do.
torch::Library& library(torch::Library::Kind kind, const std::string& ns, std::optional<c10::DispatchKey> key);

}  // namespace qk
