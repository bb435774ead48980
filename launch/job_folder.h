// The folder in which the ranks of one supervised job keep what they share, so that what a killed
// mpirun leaves behind can be told from other jobs' and removed.
#pragma once

#include <string>

namespace trireme {

// The supervisor's. Its name goes to the ranks in the variables that Open MPI reads.
class JobFolder {
 public:
  // In /dev/shm, or where the user has told Open MPI to keep shared memory. Removes what killed
  // supervisors have left there. Without a folder of its own the job uses the common one.
  JobFolder();
  ~JobFolder();
  JobFolder(const JobFolder&) = delete;
  JobFolder& operator=(const JobFolder&) = delete;
  // After an attempt; the ranks remove the folder when they end because of a failure.
  void Empty() const;

 private:
  std::string path_;
};

// The last thing a rank does: removes the folder that its supervisor, which may be gone, has made,
// once it is empty. Does nothing in other processes.
void RemoveJobFolder();

}  // namespace trireme
