#include <algorithm>
#include <fstream>

#include "surroundings.h"

namespace wnkernel::cpu {
namespace {

// At most this many CPUs are read, evenly spaced. Processors with several kinds of CPUs are small,
// so all of theirs are read; a machine with hundreds of CPUs would have thousands of files.
constexpr size_t kMostCpus = 64;

// The number of cache folders of a CPU that are read. Four are usual: data, instructions, second
// and third level.
constexpr int kIndices = 6;

// Longer numbers could overflow with a suffix.
constexpr size_t kMostDigits = 12;

// Returns -1 for anything but decimal digits.
int64_t number(std::string_view digits) {
  if (digits.empty() || digits.size() > kMostDigits) return -1;
  int64_t value = 0;
  for (const char c : digits) {
    if (c < '0' || c > '9') return -1;
    value = value * 10 + (c - '0');
  }
  return value;
}

// The number of CPUs in a list such as 0-3,8-11; 0 for anything else.
int64_t count_cpus(std::string_view list) {
  int64_t count = 0;
  while (true) {
    const size_t comma = list.find(',');
    const std::string_view range = list.substr(0, comma);
    const size_t dash = range.find('-');
    const int64_t first = number(range.substr(0, dash));
    const int64_t last = dash == range.npos ? first : number(range.substr(dash + 1));
    if (first < 0 || last < first) return 0;
    count += last - first + 1;
    if (comma == list.npos) return count;
    list.remove_prefix(comma + 1);
  }
}

// The result is empty if the file cannot be read.
std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

int64_t bytes_of(std::string_view text) {
  const char suffix = text.empty() ? '\0' : text.back();
  const int shift = suffix == 'K' ? 10 : suffix == 'M' ? 20 : 0;
  if (shift) text.remove_suffix(1);
  const int64_t value = number(text);
  return value < 0 ? -1 : value << shift;
}

std::vector<Cache> sysfs_caches(const std::string& folder, const std::vector<int>& cpus) {
  std::vector<Cache> caches;
  const size_t step = std::max<size_t>(1, (cpus.size() + kMostCpus - 1) / kMostCpus);
  for (size_t k = 0; k < cpus.size(); k += step) {
    const std::string cpu = folder + "/cpu" + std::to_string(cpus[k]) + "/cache/index";
    for (int index = 0; index < kIndices; ++index) {
      const std::string cache = cpu + std::to_string(index);
      const std::string type = first_line(cache + "/type");
      if (type != "Data" && type != "Unified") continue;
      caches.push_back({number(first_line(cache + "/level")), bytes_of(first_line(cache + "/size")),
                        count_cpus(first_line(cache + "/shared_cpu_list"))});
    }
  }
  return caches;
}

}  // namespace wnkernel::cpu
