// How many CPUs this process may really use.
#pragma once

#include <string>

namespace fastskel {

// the CPUs that the process is bound to, at most what its control groups allow (rounded up), at least 1
int available_cpus();

// limit of the control groups of a process, from the files below `root`/proc/self/cgroup and `root`/sys/fs/cgroup; 0: none
int cgroup_cpus(const std::string& root);

}  // namespace fastskel
