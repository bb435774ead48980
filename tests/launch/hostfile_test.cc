// Hostfiles as the doctor reads them before mpirun does.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "launch/doctor_checks.h"

namespace trireme {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(CheckHostfile, NamesTheLine) {
  const auto known = [](const std::string& host) { return host != "nowhere"; };
  const auto lines = [&](const std::string& text, int64_t ranks) {
    std::vector<std::string> out;
    for (const Finding& finding : CheckHostfile("hosts", text, ranks, known))
      out.push_back(finding.Line());
    return out;
  };
  EXPECT_THAT(lines("a slots=2\nb slots=2\n", 4), IsEmpty());
  EXPECT_THAT(lines("# two\n\na slots=2 max_slots=4\nme@b\n", 64), IsEmpty());
  EXPECT_THAT(lines("a slots=2\n", 0), IsEmpty());
  EXPECT_THAT(lines("a\nnowhere slots=4\n", 4),
              ElementsAre(HasSubstr("hosts:2: host \"nowhere\" has no address")));
  EXPECT_THAT(lines("a slots=2\nb slots=1\n", 4),
              ElementsAre(HasSubstr("hosts has 3 slots in all and 4 ranks are wanted")));
  EXPECT_THAT(lines("a slots=many\n", 1), ElementsAre(HasSubstr("\"slots=many\" is no number")));
  EXPECT_THAT(lines("", 1), ElementsAre(HasSubstr("0 slots")));
  EXPECT_THAT(lines("a slots=4\nb max_slots=2 slots\n", 1),
              ElementsAre(HasSubstr("hosts:2: \"slots\" is no number of slots: write slots=N")));
  EXPECT_THAT(lines("a max-slots=\n", 1), ElementsAre(HasSubstr("write max-slots=N")));
  // mpirun: "max_slots parameter is less than the slots parameter".
  EXPECT_THAT(lines("a slots=4 max_slots=2\n", 1),
              ElementsAre(HasSubstr("hosts:1: \"max_slots=2\" is less than the 4 slots")));
}

// As tried with the mpirun of Open MPI 4.1.4, and as that of 5 reads it.
TEST(CheckHostfile, CountsSlotsAsMpirunDoes) {
  struct Case {
    const char* line;
    int slots;
  };
  const Case cases[] = {{"a slots=3", 3},
                        {"a max_slots=3", 3},
                        {"a max-slots=3", 3},
                        {"a slots_max=3", 3},
                        {"a cpu-max=3", 3},
                        {"a max_count=3", 3},
                        {"a slots=3 max_slots=8", 3},
                        {"a max_slots=8 slots=3", 3},
                        {"a max_slots=2 slots=3", 3},
                        {"a cpu=3", 3},
                        {"a count=3", 3},
                        {"a slots = 3", 3},
                        {"a slots=3 # max_slots=1", 3},
                        {"a max_slots=3\nb slots=2", 5}};
  const auto known = [](const std::string&) { return true; };
  for (const auto& [line, slots] : cases) {
    SCOPED_TRACE(line);
    EXPECT_THAT(CheckHostfile("hosts", line, slots, known), IsEmpty());
    const Findings findings = CheckHostfile("hosts", line, slots + 1, known);
    ASSERT_EQ(findings.size(), 1u);
    EXPECT_EQ(findings[0].name, "slots");
    EXPECT_THAT(findings[0].Line(), HasSubstr(absl::StrCat("hosts has ", slots, " slots in all")));
  }
}

}  // namespace
}  // namespace trireme
