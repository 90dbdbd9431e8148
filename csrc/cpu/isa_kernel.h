// A kernel that is compiled once for each ISA, and called as one function.
//
// The header of an op states its kernels, the file of the op defines them:
//
//   cpu/reset.h      QK_ISA_KERNEL(reset, void(const ResetCall&, int64_t begin, int64_t end));
//   cpu/reset.cpp    namespace qk::QK_ISA { void reset(const ResetCall& call, int64_t begin, int64_t end) { ... } }
//   bindings/...     cpu::reset(call, begin, end);    calls the one of the ISA in use
//
// The versions of a kernel are a constant table, which the linker fills in. No code runs for it when the library is
// loaded: it would be compiled for an ISA that the machine may not have.
//
// QK_PRODUCT_KERNEL states one that every ISA has of its own. Of other kernels, ISAs that add VNNI and VBMI to avx512
// take those of avx512.
//
// Most kernels process the half-open range [begin, end) of a call's units; threads get ranges. How a call divides into
// units depends on its shape alone, so results are the same bits for any number of threads.
#pragma once

#include <type_traits>

#include "isa.h"

namespace qk::cpu {

template <class Function>
struct IsaKernel;

template <class Result, class... Arguments>
struct IsaKernel<Result(Arguments...)> {
  Result (*versions[kIsas])(Arguments...);

  Result operator()(Arguments... arguments) const { return versions[isa()](arguments...); }
};

}  // namespace qk::cpu

// States a kernel of a name and type in namespace qk: a function in the namespace of each ISA, and all of them as
// qk::cpu::<name>.
#define QK_ISA_KERNEL(name, ...) QK_KERNEL_TABLE(QK_PLAIN_ADDRESS, name, __VA_ARGS__)
#define QK_PRODUCT_KERNEL(name, ...) QK_KERNEL_TABLE(QK_ISA_ADDRESS, name, __VA_ARGS__)
#define QK_KERNEL_TABLE(address, name, ...)                                       \
  QK_FOR_EACH_ISA(QK_ISA_VERSION, name, __VA_ARGS__)                              \
  namespace cpu {                                                                 \
  inline constexpr IsaKernel<__VA_ARGS__> name{{QK_FOR_EACH_ISA(address, name)}}; \
  }
#define QK_ISA_VERSION(isa, name, ...)    \
  namespace isa {                         \
  std::type_identity_t<__VA_ARGS__> name; \
  }
#define QK_ISA_ADDRESS(isa, name) ::qk::isa::name,
#define QK_PLAIN_ADDRESS(isa, name) ::qk::QK_PLAIN_##isa::name,
