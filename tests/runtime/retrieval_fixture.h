// Ranks of the job as one retrieval group, beside a group of this rank alone: whatever the job
// answers, one rank must answer too, bit for bit.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "models/mol_model.h"
#include "parallel/process_groups.h"
#include "runtime/retrieval_search.h"
#include "tests/parallel/world.h"
#include "tests/retrieval_files.h"
#include "tests/testing.h"

namespace trireme {

class RetrievalTest : public ::testing::Test {
 protected:
  RetrievalTest() : device_(2) {
    auto groups = CreateProcessGroups(World(), {.tp_size = World().size()}, device_.device());
    CHECK(groups.ok()) << groups.status().ToString();
    groups_ = std::make_unique<ProcessGroups>(std::move(groups).value());
    job_ = {&World(), groups_->tp.get(), &device_.stream()};
    alone_ = {nullptr, self_.get(), &device_.stream()};
    if (World().rank() == 0) scratch_ = std::make_unique<ScratchDir>();
    dir_ = scratch_ == nullptr ? "" : scratch_->path();
    World().Broadcast(&dir_);
  }
  ~RetrievalTest() override { World().Barrier(); }

  // Rank 0 writes, the others wait.
  template <typename Write>
  std::string File(const std::string& name, Write&& write) {
    const std::string path = dir_ + "/" + name;
    if (World().rank() == 0) write(path);
    World().Barrier();
    return path;
  }
  std::unique_ptr<MolModel> Model(const MolConfig& config, uint64_t seed = 1) {
    const std::string dir =
        File("model", [&](const std::string& path) { WriteRandomHead(config, path, seed); });
    auto model = MolModel::Load(dir, device_.stream());
    CHECK(model.ok()) << model.status().ToString();
    return std::move(model).value();
  }
  std::unique_ptr<RetrievalTable> Build(const RetrievalGroup& group, const MolModel& model,
                                        const std::string& path,
                                        const RetrievalTableOptions& options = {}) {
    auto table = RetrievalTable::Build(group, model, path, options);
    CHECK(table.ok()) << table.status().ToString();
    return std::move(table).value();
  }
  static std::vector<RetrievalQuery> Queries(const MolModel& model, int64_t count, uint64_t seed) {
    std::vector<RetrievalQuery> queries(count);
    for (int64_t b = 0; b < count; ++b) {
      queries[b].user_id = b;
      for (int64_t k = 0; k < model.config().query_dim; ++k) {
        queries[b].embedding.push_back(
            static_cast<float>(RandomValue(seed, b * model.config().query_dim + k)));
      }
    }
    return queries;
  }
  static std::vector<RetrievalAnswer> Search(const RetrievalTable& table,
                                             const std::vector<RetrievalQuery>& queries,
                                             const RetrievalOptions& options) {
    auto answers = SearchTable(table, queries, options);
    CHECK(answers.ok()) << answers.status().ToString();
    return std::move(answers).value();
  }
  static void ExpectSame(const std::vector<RetrievalAnswer>& a,
                         const std::vector<RetrievalAnswer>& b) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_EQ(a[i].status, b[i].status) << "query " << i;
      ASSERT_EQ(a[i].ids, b[i].ids) << "query " << i;
      ASSERT_EQ(a[i].scores, b[i].scores) << "query " << i;
    }
  }

  TestDevice device_;
  std::unique_ptr<ProcessGroups> groups_;
  std::unique_ptr<Communicator> self_ = NewSelfCommunicator();
  RetrievalGroup job_, alone_;
  std::unique_ptr<ScratchDir> scratch_;
  std::string dir_;
};

}  // namespace trireme
