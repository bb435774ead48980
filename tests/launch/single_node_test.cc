// The shell and the program set the same from launch/single_node.env.
#include "launch/single_node.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace trireme {
namespace {

bool IsSetting(const std::string& variable) {
  for (const char* prefix : {"OMPI_", "PRTE_", "OMP_"}) {
    if (absl::StartsWith(variable, prefix)) return true;
  }
  return false;
}

std::set<std::string> OfTheProgram() {
  std::set<std::string> out;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (IsSetting(*variable)) out.insert(*variable);
  }
  return out;
}

std::set<std::string> OfTheShell(const std::string& assignments) {
  const std::string command =
      absl::StrCat("env -i PATH=/usr/bin:/bin ", assignments, " bash -c 'source \"",
                   TRIREME_SOURCE_DIR, "/launch/mpi_env.sh\"; single_node_mpi_environment; env'");
  std::set<std::string> out;
  FILE* const pipe = popen(command.c_str(), "r");
  std::string line;
  for (int c = fgetc(pipe); c != EOF; c = fgetc(pipe)) {
    if (c != '\n') {
      line += static_cast<char>(c);
      continue;
    }
    if (IsSetting(line)) out.insert(line);
    line.clear();
  }
  EXPECT_EQ(pclose(pipe), 0) << command;
  return out;
}

TEST(SingleNode, ShellAndProgramAgree) {
  clearenv();
  setenv("PATH", "/usr/bin:/bin", 1);
  SetSingleNodeEnvironment();
  EXPECT_EQ(OfTheProgram(), OfTheShell(""));
  EXPECT_EQ(OfTheProgram().count("OMPI_MCA_btl=self,vader"), 1u);
  EXPECT_GE(OfTheProgram().size(), 10u);
}

TEST(SingleNode, WhatTheUserHasSetStays) {
  clearenv();
  setenv("PATH", "/usr/bin:/bin", 1);
  setenv("OMPI_MCA_btl", "self,tcp", 1);
  setenv("OMPI_MCA_pml", "", 1);  // as good as not set
  SetSingleNodeEnvironment();
  EXPECT_EQ(OfTheProgram(), OfTheShell("OMPI_MCA_btl=self,tcp OMPI_MCA_pml="));
  EXPECT_STREQ(std::getenv("OMPI_MCA_btl"), "self,tcp");
  EXPECT_STREQ(std::getenv("OMPI_MCA_pml"), "ob1");
}

}  // namespace
}  // namespace trireme
