// trireme doctor, and the same checks at the start of every command that runs a model: what is
// looked at, in which order, and who speaks. The checks themselves are in launch/doctor_checks.h.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "launch/commands.h"
#include "launch/doctor_checks.h"
#include "launch/environment.h"
#include "parallel/control_plane.h"

namespace trireme {

struct DoctorFlags {
  std::string model_dir;  // empty: no checkpoint is looked at
  int tp = 0, pp = 0, dp = 0;
  std::string device = "auto";
  std::string hostfile;
  bool json = false;
};

// Instead of starting MPI, when CheckLaunch has an error: says it on stderr where this process is
// the one to speak (rank 0, or of a host's own fault its first rank). The exit status.
int SayWhyNotStarted(const Environment& environment);

// A launcher ends the whole job when one rank leaves: those that have nothing to say wait here for
// the one that has.
void LetOthersSpeak();

// After MPI: whether its ranks are those that the launcher started, or each is alone. An empty
// message where another process says it.
absl::Status CheckOneWorld(const ControlPlane& control, const Environment& environment);

// Then, before the model is touched; collective. The same status on every rank: its message is
// one line for each finding that forbids the job to run. Warnings are for `trireme doctor`. Below
// 1 ms on one host; on several, the time to read the checkpoint's headers.
absl::Status CheckAtStart(ControlPlane& control, const Environment& environment,
                          const ModelFlags& flags);

// The whole report on stdout. Without a control plane MPI cannot be started, and only what this
// process sees counts. Exit status: 0, or 1 when the job cannot work.
int RunDoctor(ControlPlane* control, const Environment& environment, const DoctorFlags& flags);

}  // namespace trireme
