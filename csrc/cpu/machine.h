// The caches and pages of this machine, read once. Speed may depend on them, but no bit of a result
// may.
#pragma once
#include <cstdint>

namespace wnkernel::cpu {

struct Machine {
  int64_t l1d;   // bytes of a core's first-level data cache
  int64_t l2;    // bytes of the second-level cache per CPU that shares it
  int64_t l3;    // bytes of the last-level cache per CPU that shares it: the share of one thread
  int64_t page;  // bytes of a page

  // The source of each size: "environment", "sysfs", "cpuid", "system" or "default".
  struct Sources {
    const char *l1d, *l2, *l3, *page;
  } sources;
};

// The machine that this process runs on. Throws std::invalid_argument if WNKERNEL_CPU_L1D,
// WNKERNEL_CPU_L2 or WNKERNEL_CPU_L3 is no possible size of its cache.
const Machine& machine();

}  // namespace wnkernel::cpu
