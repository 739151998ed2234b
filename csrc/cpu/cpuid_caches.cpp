#include "surroundings.h"

#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace wnkernel::cpu {
namespace {

// The bits from low to high of x.
constexpr int64_t bits(uint32_t x, int high, int low) {
  return (x >> low) & ((uint64_t{1} << (high - low + 1)) - 1);
}

constexpr int kNone = 0, kData = 1, kUnified = 3;  // types of caches

constexpr int64_t kMostSets = 1 << 26;  // more than any cache has, and small enough for the product

}  // namespace

std::vector<Cache> cpuid_caches(const CpuidCaches& registers) {
  std::vector<Cache> caches;
  for (const auto& [eax, ebx, ecx] : registers) {
    const int64_t type = bits(eax, 4, 0);
    if (type != kData && type != kUnified) continue;
    const int64_t ways = bits(ebx, 31, 22) + 1, partitions = bits(ebx, 21, 12) + 1;
    const int64_t line = bits(ebx, 11, 0) + 1, sets = std::min(int64_t{ecx}, kMostSets) + 1;
    caches.push_back({bits(eax, 7, 5), ways * partitions * line * sets, bits(eax, 25, 14) + 1});
  }
  return caches;
}

#if defined(__x86_64__)

CpuidCaches ask_cpuid() {
  constexpr unsigned kLeaves[] = {4, 0x8000001D};  // everybody's; AMD's and Hygon's
  constexpr unsigned kMostCaches = 8;
  CpuidCaches registers;
  for (const unsigned leaf : kLeaves) {
    for (unsigned k = 0; k < kMostCaches; ++k) {
      unsigned eax, ebx, ecx, edx;
      if (!__get_cpuid_count(leaf, k, &eax, &ebx, &ecx, &edx) || bits(eax, 4, 0) == kNone) break;
      registers.push_back({eax, ebx, ecx});
    }
    if (!registers.empty()) break;
  }
  return registers;
}

#else

CpuidCaches ask_cpuid() { return {}; }

#endif

}  // namespace wnkernel::cpu
