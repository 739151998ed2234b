// What the facts about a machine are read from, right or wrong: machine.cpp decides what to
// believe.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "machine.h"

namespace wnkernel::cpu {

// eax, ebx and ecx for each cache, of leaf 4 or of AMD's.
using CpuidCaches = std::vector<std::array<uint32_t, 3>>;

struct Surroundings {
  std::string sysfs;      // the folder /sys/devices/system/cpu
  std::vector<int> cpus;  // those that this process may run on
  CpuidCaches cpuid;
};

// The machine of such surroundings, whatever the environment says.
Machine machine_in(const Surroundings& around);

// A cache for data, as a source describes it.
struct Cache {
  int64_t level;    // -1 if that is no number
  int64_t size;     // bytes of all of it; -1 if that is no number
  int64_t sharing;  // how many CPUs share it; 0 if that is not known
};

// What "49152", "48K" or "2M" says; -1 for anything else.
int64_t bytes_of(std::string_view text);

// Empty where there is no such folder.
std::vector<Cache> sysfs_caches(const std::string& folder, const std::vector<int>& cpus);

std::vector<Cache> cpuid_caches(const CpuidCaches& registers);

// Of the CPU that asks; empty where there is no such instruction.
CpuidCaches ask_cpuid();

}  // namespace wnkernel::cpu
