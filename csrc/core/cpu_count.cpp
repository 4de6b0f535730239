#include "core/cpu_count.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <thread>

namespace fastskel {

namespace {

// CPUs that `quota` microseconds in every `period` amount to; 0: no limit
int whole_cpus(std::int64_t quota, std::int64_t period) noexcept {
  constexpr std::int64_t kMost = 1 << 20;
  if (quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::min((quota - 1) / period + 1, kMost));
}

// version 2: "max 100000" or "150000 100000"
int limit_unified(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  std::int64_t quota = 0, period = 0;
  return file >> quota >> period ? whole_cpus(quota, period) : 0;
}

// version 1: two files, -1 where there is no limit
int limit_legacy(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
  std::int64_t quota = 0, period = 0;
  return quota_file >> quota && period_file >> period ? whole_cpus(quota, period) : 0;
}

int smaller(int a, int b) noexcept { return a == 0 || b == 0 ? std::max(a, b) : std::min(a, b); }

// least limit from the group itself up to the root of what is mounted
template <typename Limit>
int least_limit(const std::string& mount, std::string path, Limit limit) {
  int least = 0;
  for (;;) {
    least = smaller(least, limit(mount + path));
    const std::size_t slash = path.find_last_of('/');
    if (path.empty() || slash == std::string::npos) return least;
    path.erase(slash);
  }
}

int bound_cpus() {
#ifdef __linux__
  // the mask must have room for every CPU the machine can have; it is not known beforehand how many those are
  for (int room = 1024; room <= 1 << 20; room *= 2) {
    cpu_set_t* mask = CPU_ALLOC(static_cast<std::size_t>(room));
    if (mask == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(room));
    const int count = sched_getaffinity(0, bytes, mask) == 0 ? CPU_COUNT_S(bytes, mask) : 0;
    CPU_FREE(mask);
    if (count > 0) return count;
  }
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int cgroup_cpus(const std::string& root) {
  // lines "number:controllers:path"; version 2 has number 0 and no controllers
  std::ifstream file(root + "/proc/self/cgroup");
  int least = 0;
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (controllers.empty()) {
      // where both versions are mounted, version 2 lies in a folder of its own
      for (const char* mount : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}) {
        least = smaller(least, least_limit(root + mount, path, limit_unified));
      }
      continue;
    }
    std::istringstream names(controllers);
    for (std::string name; std::getline(names, name, ',');) {
      if (name != "cpu") continue;
      for (const char* mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
        least = smaller(least, least_limit(root + mount, path, limit_legacy));
      }
    }
  }
  return least;
}

int available_cpus() { return std::max(1, smaller(bound_cpus(), cgroup_cpus(""))); }

}  // namespace fastskel
