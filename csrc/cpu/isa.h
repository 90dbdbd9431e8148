// Which ISA's kernels are in use. Kernels are compiled once for each ISA; the choice is made at the first call.
#pragma once

#include <atomic>
#include <string>

#include "isas.h"

namespace qk::cpu {

#define QK_ISA_NAME(isa) isa,
enum Isa : int { QK_FOR_EACH_ISA(QK_ISA_NAME) kIsas };
#undef QK_ISA_NAME

// Chooses the widest ISA that this machine has and that ATEN_CPU_CAPABILITY (default, avx2, avx512) allows; unset, it
// allows all. QATKERNELS_ISA names one instead. Throws std::runtime_error if this machine or this build does not have
// that one.
Isa choose_isa();

inline constinit std::atomic<int> chosen_isa{-1};  // -1 until the first call

// The ISA in use.
inline Isa isa() {
  const int known = chosen_isa.load(std::memory_order_relaxed);
  return known >= 0 ? static_cast<Isa>(known) : choose_isa();
}

const char* name_of(Isa isa);

// For tests: from now on isa() is a named one; returns the name of the former one. Calls that run meanwhile may use
// kernels of both. Throws std::invalid_argument if this machine or this build does not have it.
const char* use_isa(const std::string& name);

// Whether this machine runs one of the compiled ISAs.
bool has_isa(const std::string& name);
// The names of the compiled ISAs, separated by spaces, widest last.
std::string compiled_isas();

}  // namespace qk::cpu
