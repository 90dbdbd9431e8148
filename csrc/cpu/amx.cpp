// AMX: whether the machine has it, and the permission that Linux wants.
#include "amx.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(QK_WITH_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qk::cpu {
namespace {

constexpr const char* kNames[] = {"none", "portable", "amx"};

// Whether this process may use AMX. The registers take 8 KiB of a thread's state, so Linux wants to be asked for them,
// once in each process; threads and forked children have the permission too.
bool has_amx() {
#if defined(QK_WITH_AMX) && defined(__linux__)
  static const bool granted = [] {
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;  // leaf 7, EDX
    constexpr long request = 0x1023, tile_data = 18;                       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (bf16 | tile | int8))) return false;
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

std::atomic<int> in_use{-1};  // -1 until the first call

}  // namespace

Tiles tiles() {
  int known = in_use.load(std::memory_order_relaxed);
  if (known < 0) {
    const char* const given = std::getenv("QATKERNELS_AMX");
    const std::string wanted = given ? given : "";
    if (wanted != "" && wanted != "0" && wanted != "1")
      throw std::runtime_error("QATKERNELS_AMX is '" + wanted + "', must be 0 (no tiles of AMX) or 1");
    const bool allowed = wanted != "0";
    const int best = static_cast<int>(allowed && has_amx() ? Tiles::amx : Tiles::none);
    // Another thread may have stored its choice first: the same one, or that of a test.
    if (in_use.compare_exchange_strong(known, best)) known = best;
  }
  return static_cast<Tiles>(known);
}

const char* name_of(Tiles tiles) { return kNames[static_cast<int>(tiles)]; }

const char* use_tiles(const std::string& name) {
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (name != kNames[i]) continue;
    if (static_cast<Tiles>(i) == Tiles::amx && !has_amx())
      throw std::invalid_argument("tiles is 'amx', but this machine has none; must be 'none' or 'portable'");
    const char* const former = name_of(tiles());
    in_use.store(i);
    return former;
  }
  throw std::invalid_argument("tiles is '" + name + "', must be 'none', 'portable' or 'amx'");
}

}  // namespace qk::cpu
