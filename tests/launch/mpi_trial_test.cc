#include "launch/mpi_trial.h"

#include <gmock/gmock.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>

namespace trireme {
namespace {

using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::IsEmpty;

// What `script` refuses of the variables, which are set for it. Trials that end of themselves may
// take as long as they need.
std::vector<std::string> Refused(const std::map<std::string, std::string>& variables,
                                 const std::string& script,
                                 milliseconds limit = std::chrono::minutes(5)) {
  Environment environment;
  for (const auto& [name, value] : variables) {
    setenv(name.c_str(), value.c_str(), 1);
    environment.variables[name] = value;
  }
  std::vector<std::string> refused =
      RefusedMpiVariables(environment, {"/bin/sh", "-c", script}, limit);
  for (const auto& [name, value] : variables) unsetenv(name.c_str());
  return refused;
}

int LinesOf(const std::string& path) {
  std::ifstream in(path);
  int lines = 0;
  for (std::string line; std::getline(in, line);) ++lines;
  return lines;
}

TEST(MpiTrial, NamesTheVariablesThatAreToBlame) {
  const std::map<std::string, std::string> variables = {
      {"OMPI_MCA_a", "1"}, {"PMIX_MCA_b", "1"}, {"PRTE_MCA_c", "1"}};
  EXPECT_THAT(Refused(variables, "true"), IsEmpty());
  EXPECT_THAT(Refused(variables, R"(test -z "$PMIX_MCA_b")"), ElementsAre("PMIX_MCA_b"));
  // Either of two is enough, so that taking one away does not help.
  EXPECT_THAT(Refused(variables, R"(test -z "$OMPI_MCA_a$PRTE_MCA_c")"),
              ElementsAre("OMPI_MCA_a", "PRTE_MCA_c"));
  // Both together.
  EXPECT_THAT(Refused(variables, R"(test -z "$OMPI_MCA_a" || test -z "$PRTE_MCA_c")"),
              ElementsAre("OMPI_MCA_a", "PRTE_MCA_c"));
  EXPECT_THAT(Refused(variables, R"(test -z "$PMIX_MCA_b" || kill -s SEGV $$)"),
              ElementsAre("PMIX_MCA_b"));
}

TEST(MpiTrial, BlamesNoVariableForWhatFailsWithoutThem) {
  EXPECT_THAT(Refused({{"OMPI_MCA_a", "1"}}, "false"), IsEmpty());
  EXPECT_THAT(Refused({{"OMPI_MCA_a", "1"}}, "sleep 1000", milliseconds(1)), IsEmpty());
  Environment environment;
  environment.variables["OMPI_MCA_a"] = "1";
  EXPECT_THAT(RefusedMpiVariables(environment, {"/no/such/program"}), IsEmpty());
}

TEST(MpiTrial, TriesOnlyWhatTheUserHasSet) {
  const std::string log = testing::TempDir() + "/trials";
  std::remove(log.c_str());
  const std::string script = "echo x >>" + log;
  Refused({{"OMPI_COMM_WORLD_SIZE", "1"}, {"SLURM_JOB_ID", "7"}, {"OMPI_MCA_btl", "self,vader"}},
          script);
  EXPECT_EQ(LinesOf(log), 0);
  Refused({{"OMPI_MCA_btl", "self"}}, script);
  EXPECT_EQ(LinesOf(log), 1);
}

TEST(MpiTrial, NeitherReadsNorWritesWhatIsTheProgram) {
  testing::internal::CaptureStdout();
  EXPECT_THAT(Refused({{"OMPI_MCA_a", "1"}}, "read line && false; echo page; echo page >&2; true"),
              IsEmpty());
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
}

TEST(MpiTrial, EndsWhatHangs) {
  // The time that the trials without it get must be enough for a shell to start on a busy machine.
  EXPECT_THAT(Refused({{"OMPI_MCA_a", "1"}}, R"(test -z "$OMPI_MCA_a" || sleep 1000)",
                      std::chrono::seconds(5)),
              ElementsAre("OMPI_MCA_a"));
}

}  // namespace
}  // namespace trireme
