#include "machine.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__linux__)
#include <sched.h>
#endif

#include "surroundings.h"

namespace wnkernel::cpu {
namespace {

constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;

// The limits of a CPU's share of a cache. Sizes outside are not believed; all sizes that were ever
// sold are well within.
struct Limits {
  const char* variable;
  const char* expected;
  int64_t least, most;
  int64_t usual;  // the size if no source knows it: small, so that plans fit
};
constexpr Limits kLimits[] = {
    // The first level, the second and the third.
    {"WNKERNEL_CPU_L1D", "4K to 1M", 4 * kKiB, kMiB, 32 * kKiB},
    {"WNKERNEL_CPU_L2", "16K to 64M", 16 * kKiB, 64 * kMiB, 256 * kKiB},
    {"WNKERNEL_CPU_L3", "16K to 1024M", 16 * kKiB, 1024 * kMiB, kMiB},
};

// No CPU has a larger share of a third level (Epyc 7373X: 768 MiB for 16 cores). A virtual machine
// reports all of its host's third level as its own.
constexpr int64_t kMostL3 = 48 * kMiB;

struct Fact {
  int64_t bytes;  // 0 if it is unknown
  const char* source;
};

bool believable(int level, int64_t bytes) {
  const Limits& limits = kLimits[level - 1];
  return bytes >= limits.least && bytes <= limits.most;
}

// The smallest believable share, because a thread may run on any CPU, and CPUs may differ.
Fact smallest(const std::vector<Cache>& caches, int level, const char* source) {
  Fact found{0, source};
  for (const Cache& c : caches) {
    const int64_t among = level == 1 ? 1 : c.sharing;  // each core has its own first level
    if (c.level != level || among < 1) continue;
    const int64_t share = c.size / among;
    if (believable(level, share) && (!found.bytes || share < found.bytes)) found.bytes = share;
  }
  return found;
}

std::vector<int> allowed_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    std::vector<int> cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    return cpus;
  }
#endif
  return {0};
}

Fact page() {
  constexpr int64_t kUsual = 4 * kKiB;
  const int64_t bytes = sysconf(_SC_PAGESIZE);
  const bool right = bytes >= kUsual && bytes <= kMiB && (bytes & (bytes - 1)) == 0;
  return right ? Fact{bytes, "system"} : Fact{kUsual, "default"};
}

// A setting in the environment replaces what was found.
void replace(int level, int64_t& bytes, const char*& source) {
  const Limits& limits = kLimits[level - 1];
  const char* text = std::getenv(limits.variable);
  if (!text || !*text) return;
  const int64_t wanted = bytes_of(text);
  if (!believable(level, wanted))
    throw std::invalid_argument(std::string(limits.variable) + ": expected " + limits.expected +
                                " (bytes, K or M), got " + text);
  bytes = wanted;
  source = "environment";
}

Machine find() {
  const char* sysfs = "/sys/devices/system/cpu";
  Machine found = machine_in({sysfs, allowed_cpus(), ask_cpuid()});
  replace(1, found.l1d, found.sources.l1d);
  replace(2, found.l2, found.sources.l2);
  replace(3, found.l3, found.sources.l3);
  return found;
}

}  // namespace

Machine machine_in(const Surroundings& around) {
  const std::vector<Cache> files = sysfs_caches(around.sysfs, around.cpus);
  const std::vector<Cache> told = cpuid_caches(around.cpuid);
  const auto known = [&](int level) {
    const Fact file = smallest(files, level, "sysfs");
    return file.bytes ? file : smallest(told, level, "cpuid");
  };
  const auto or_usual = [](const Fact& fact, int level) {
    return fact.bytes ? fact : Fact{kLimits[level - 1].usual, "default"};
  };
  const Fact l1d = or_usual(known(1), 1), second = known(2), third = known(3);
  const Fact l2 = or_usual(second, 2);
  Fact l3 = or_usual(third.bytes ? third : second, 3);  // without a third level, the second is last
  l3.bytes = std::min(l3.bytes, kMostL3);
  const Fact pages = page();
  const Machine::Sources sources{l1d.source, l2.source, l3.source, pages.source};
  return {l1d.bytes, l2.bytes, l3.bytes, pages.bytes, sources};
}

const Machine& machine() {
  static const Machine found = find();
  return found;
}

}  // namespace wnkernel::cpu
