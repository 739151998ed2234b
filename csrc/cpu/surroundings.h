// The sources of facts about a machine. A source may be wrong; machine.cpp decides what to believe.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "machine.h"

namespace wnkernel::cpu {

// eax, ebx and ecx for each cache, from leaf 4 or AMD's leaf.
using CpuidCaches = std::vector<std::array<uint32_t, 3>>;

struct Surroundings {
  std::string sysfs;      // the folder /sys/devices/system/cpu
  std::vector<int> cpus;  // the CPUs that this process may run on
  CpuidCaches cpuid;
};

// The machine that such surroundings describe, without the settings of the environment.
Machine machine_in(const Surroundings& around);

// A data cache, as a source describes it.
struct Cache {
  int64_t level;    // -1 if the source has no number
  int64_t size;     // bytes of the whole cache; -1 if the source has no number
  int64_t sharing;  // the number of CPUs that share it; 0 if it is unknown
};

// The bytes that "49152", "48K" or "2M" means; -1 for anything else.
int64_t bytes_of(std::string_view text);

// The result is empty if the folder does not exist.
std::vector<Cache> sysfs_caches(const std::string& folder, const std::vector<int>& cpus);

std::vector<Cache> cpuid_caches(const CpuidCaches& registers);

// Asks the current CPU. The result is empty if it has no cpuid instruction.
CpuidCaches ask_cpuid();

}  // namespace wnkernel::cpu
