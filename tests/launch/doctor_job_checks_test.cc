// What the reports of a job's ranks show when they are laid side by side.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "launch/doctor_checks.h"

namespace trireme {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

RankReport Report(const std::string& host) {
  return {.host = host,
          .program = "abcdef0123456789",
          .mpi = "4.1.4",
          .checkpoint = {"config.json 700 11", "model.safetensors 1000 22"},
          .networks = {"10.0.0.0/24"},
          .gpus = {"0000:1b:00.0", "0000:43:00.0"}};
}

// Findings of two hosts with two ranks each, after `change` to the fourth rank's report.
template <typename Change>
std::vector<std::string> LinesAfter(const JobPlan& plan, Change change) {
  std::vector<RankReport> reports = {Report("a"), Report("a"), Report("b"), Report("b")};
  change(reports);
  // Through the wire.
  for (RankReport& report : reports) report = ParseRankReport(Serialize(report));
  std::vector<std::string> lines;
  for (const Finding& finding : CheckJob(reports, plan)) lines.push_back(finding.Line());
  return lines;
}

using Reports = std::vector<RankReport>;

TEST(CheckJob, EqualHostsAreHealthy) {
  EXPECT_THAT(LinesAfter({.cuda = true}, [](Reports&) {}), IsEmpty());
  EXPECT_THAT(CheckJob({}, {}), IsEmpty());
}

TEST(CheckJob, AnotherBinary) {
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[2].program = r[3].program = "77"; }),
              ElementsAre(HasSubstr("ranks 2, 3 on b run another build of this program (77) than "
                                    "rank 0 on a (abcdef012345)")));
}

TEST(CheckJob, AnotherMpi) {
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[1].mpi = "5.0.7"; }),
              ElementsAre(HasSubstr("rank 1 on a runs another Open MPI (5.0.7)")));
}

TEST(CheckJob, AnotherCheckpoint) {
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[2].checkpoint[1] = "model.safetensors 1000 23"; }),
              ElementsAre(HasSubstr("host b has another model.safetensors than a")));
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[2].checkpoint.pop_back(); }),
              ElementsAre(HasSubstr("host b lacks model.safetensors, which a has")));
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[2].checkpoint = {"-"}; }),
              ElementsAre(HasSubstr("host b lacks config.json, model.safetensors")));
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[2].checkpoint.push_back("tokenizer.json 3 4"); }),
              ElementsAre(HasSubstr("host b has another tokenizer.json than a")));
  // Only the first rank of a host looks.
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[1].checkpoint = r[3].checkpoint = {}; }),
              IsEmpty());
}

TEST(CheckJob, HostsWithoutACommonNetwork) {
  const auto lines =
      LinesAfter({}, [](Reports& r) { r[2].networks = r[3].networks = {"10.9.0.0/24"}; });
  EXPECT_THAT(lines, ElementsAre(HasSubstr("b and a have no subnet in common")));
}

TEST(CheckJob, MoreRanksThanGpus) {
  EXPECT_THAT(
      LinesAfter({.cuda = true}, [](Reports& r) { r[2].gpus = r[3].gpus = {"0000:1b:00.0"}; }),
      ElementsAre(HasSubstr("host b has 2 ranks and 1 GPUs they may use")));
  // One GPU each, and not the same.
  EXPECT_THAT(LinesAfter({.cuda = true},
                         [](Reports& r) {
                           r[2].gpus = {"of task 2"};
                           r[3].gpus = {"of task 3"};
                         }),
              IsEmpty());
  EXPECT_THAT(LinesAfter({}, [](Reports& r) { r[2].gpus = r[3].gpus = {}; }), IsEmpty());
  // With leave to share there must be one.
  const JobPlan shared{.cuda = true, .shared_gpus = true};
  EXPECT_THAT(LinesAfter(shared, [](Reports& r) { r[2].gpus = r[3].gpus = {"0000:1b:00.0"}; }),
              IsEmpty());
  EXPECT_THAT(LinesAfter(shared, [](Reports& r) { r[2].gpus = r[3].gpus = {}; }),
              ElementsAre(HasSubstr("host b has 2 ranks and 0 GPUs")));
}

TEST(CheckJob, MoreRanksThanGpusOfAPlanThatIsAhead) {
  const std::vector<RankReport> doctor = {Report("a")};  // two GPUs
  JobPlan plan{.tp = 2, .cuda = true, .ahead = true};
  EXPECT_THAT(CheckJob(doctor, plan), IsEmpty());
  plan.pp = 2;
  const Findings findings = CheckJob(doctor, plan);
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_THAT(findings[0].Line(), HasSubstr("host a has 4 ranks and 2 GPUs they may use"));
  // The hostfile names hosts that the doctor does not see.
  plan.hostfile = true;
  EXPECT_THAT(CheckJob(doctor, plan), IsEmpty());
}

TEST(NetworksOf, LeavesOutLoopbackAndBridges) {
  Environment environment;
  environment.interfaces = {{"lo", "127.0.0.1", 8},
                            {"docker0", "172.17.0.1", 16},
                            {"eth0", "10.1.2.200", 25},
                            {"eth1", "nonsense", 24},
                            {"tun0", "10.8.0.1", 32}};
  EXPECT_THAT(NetworksOf(environment), ElementsAre("10.1.2.128/25", "10.8.0.1/32"));
}

}  // namespace
}  // namespace trireme
