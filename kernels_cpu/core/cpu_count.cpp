// How many threads to use when nobody says.
#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#include "core/threads.h"

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace localllm {

#if defined(__linux__)

namespace {

// Distinct (package, core) pairs among the processors we may run on: a second hardware thread of
// a core adds nothing to work bound by memory.
int allowed_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0)
    return static_cast<int>(std::thread::hardware_concurrency());
  std::set<std::pair<int, int>> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    int package = 0, core = 0;
    std::ifstream package_file(folder + "physical_package_id"), core_file(folder + "core_id");
    if (package_file >> package && core_file >> core)
      cores.insert({package, core});
    else
      cores.insert({-1, cpu});
  }
  return static_cast<int>(cores.size());
}

// The cgroup's processor quota in whole processors, rounded up; 0 when there is none.
int quota() {
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string limit;
  double period = 0;
  if (v2 >> limit >> period && limit != "max" && period > 0)
    return static_cast<int>((std::stod(limit) + period - 1) / period);
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double allowed = 0;
  if (quota_file >> allowed && period_file >> period && allowed > 0 && period > 0)
    return static_cast<int>((allowed + period - 1) / period);
  return 0;
}

}  // namespace

int default_threads() {
  const int cores = allowed_cores(), limit = quota();
  return std::max(1, limit > 0 ? std::min(cores, limit) : cores);
}

#elif defined(__APPLE__)

int default_threads() {
  int cores = 0;
  size_t size = sizeof(cores);
  if (sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0)
    return cores;
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

#else

int default_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

#endif

}  // namespace localllm
