// CPUs that control groups allow, from files like those of the kernel.
#include <filesystem>

#include "check.h"
#include "core/cpu_count.h"

namespace fastskel_tests {

namespace {

// one file below a root, with the folders above it
void put(const Folder& root, const std::string& name, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(root / name).parent_path());
  write(root / name, text);
}

}  // namespace

void test_cpu_count() {
  check(fastskel::available_cpus() >= 1, "at least one CPU");
  const std::string groups = "proc/self/cgroup", mount = "sys/fs/cgroup/";
  {
    const Folder root;
    check(fastskel::cgroup_cpus(root / "") == 0, "no control groups");
    put(root, groups, "0::/a/b\n");
    check(fastskel::cgroup_cpus(root / "") == 0, "no files");
    put(root, mount + "a/b/cpu.max", "max 100000\n");
    check(fastskel::cgroup_cpus(root / "") == 0, "version 2 without a limit");
    put(root, mount + "a/b/cpu.max", "400000 100000\n");
    check(fastskel::cgroup_cpus(root / "") == 4, "version 2, limit of the group");
    put(root, mount + "a/cpu.max", "250000 100000\n");
    check(fastskel::cgroup_cpus(root / "") == 3, "version 2, limit of a group above, rounded up");
    put(root, mount + "cpu.max", "1000 100000\n");
    check(fastskel::cgroup_cpus(root / "") == 1, "version 2, limit of the root");
  }
  {
    const Folder root;
    put(root, groups, "5:memory:/x\n4:cpuset:/\n3:cpu,cpuacct:/docker/1\nnonsense\n");
    put(root, mount + "memory/x/cpu.cfs_quota_us", "100000\n");
    put(root, mount + "memory/x/cpu.cfs_period_us", "100000\n");
    check(fastskel::cgroup_cpus(root / "") == 0, "version 1, only the controller of CPUs counts");
    put(root, mount + "cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
    put(root, mount + "cpu,cpuacct/cpu.cfs_period_us", "100000\n");
    check(fastskel::cgroup_cpus(root / "") == 0, "version 1 without a limit");
    // a container sees its own group as the root of the mount
    put(root, mount + "cpu,cpuacct/cpu.cfs_quota_us", "200000\n");
    check(fastskel::cgroup_cpus(root / "") == 2, "version 1, limit of the root");
  }
}

}  // namespace fastskel_tests
