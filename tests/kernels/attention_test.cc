#include <cmath>
#include <limits>

#include "tests/reference/reference.h"
#include "tests/testing.h"

namespace trireme {
namespace {

struct Sequence {
  int32_t q_len;
  int32_t kv_len;
};

constexpr int64_t kFewQueries = 8;  // of a sequence, which a workspace is made for

// A batch with its cache. Slots that belong to no position hold NaN: reading one would show.
struct Problem {
  reference::Heads heads;
  reference::RaggedBatch batch;
  Tensor q, k, v, page_tables, cu_q_lens, kv_lens;
  PagedKv kv() const { return {k.view(), v.view(), page_tables.view()}; }
};

class AttentionTest : public KernelTest {
 protected:
  Problem Make(const reference::Heads& heads, const std::vector<Sequence>& sequences,
               int64_t page_size);
  // Where few queries take another way (a workspace allows it), both ways, which must agree.
  Tensor Run(const Problem& problem, AttentionShape shape) {
    Tensor out = RunOnce(problem, shape);
    const int64_t bytes = AttentionWorkspaceBytes(
        stream(), {.dtype = dtype(),
                   .sequences = problem.kv_lens.view().dim(0),
                   .q_heads = problem.heads.q_heads,
                   .kv_heads = problem.heads.kv_heads,
                   .head_dim = problem.heads.head_dim,
                   .max_kv_len = problem.page_tables.view().dim(1) * problem.k.view().dim(1),
                   .decode_q_len = kFewQueries});
    if (bytes > 0) {
      const Tensor workspace = device_.Zeros(DType::kU8, {bytes});
      shape.workspace = workspace.view();
      shape.decode_q_len = kFewQueries;
      ExpectSameBits(RunOnce(problem, shape).view(), out.view());
      ExpectSameBits(RunOnce(problem, shape).view(), out.view());  // the counters are zero again
    }
    return out;
  }
  // Of one sequence, Make's {{kv_len, kv_len}}: its queries [begin, end) alone, over its keys
  // before end.
  Tensor RunPart(const Problem& whole, int32_t begin, int32_t end, const AttentionShape& shape) {
    Problem part{.heads = whole.heads,
                 .batch = {},
                 .q = device_.Zeros(dtype(), {end - begin, whole.q.view().dim(1)}),
                 .k = device_.Zeros(dtype(), whole.k.view().shape),
                 .v = device_.Zeros(dtype(), whole.v.view().shape),
                 .page_tables = device_.Zeros(DType::kI32, whole.page_tables.view().shape),
                 .cu_q_lens = device_.From(std::vector<int32_t>{0, end - begin}),
                 .kv_lens = device_.From(std::vector<int32_t>{end})};
    const auto copy = [&](const Tensor& to, ConstTensorView from) {
      stream().Copy(to.view().data, from.data, to.bytes());
    };
    copy(part.q, whole.q.view().Rows(begin, end - begin));
    copy(part.k, whole.k.view());
    copy(part.v, whole.v.view());
    copy(part.page_tables, whole.page_tables.view());
    return Run(part, shape);
  }
  Tensor RunOnce(const Problem& problem, const AttentionShape& shape) {
    Tensor out = device_.Zeros(dtype(), problem.q.view().shape);
    PagedAttention(stream(), problem.q.view(), problem.kv(), problem.cu_q_lens.view(),
                   problem.kv_lens.view(), shape, out.view());
    return out;
  }
  void CompareWithReference(const Problem& problem, int64_t page_size, const AttentionShape& shape);
};

Problem AttentionTest::Make(const reference::Heads& heads, const std::vector<Sequence>& sequences,
                            int64_t page_size) {
  Problem p{.heads = heads,
            .batch = {},
            .q = {},
            .k = {},
            .v = {},
            .page_tables = {},
            .cu_q_lens = {},
            .kv_lens = {}};
  int32_t tokens = 0, pages = 0;
  int64_t most_pages = 1;
  p.batch.cu_q_lens = {0};
  for (const Sequence& s : sequences) {
    p.batch.cu_q_lens.push_back(tokens += s.q_len);
    p.batch.kv_lens.push_back(s.kv_len);
    const int64_t count = (s.kv_len + page_size - 1) / page_size;
    p.batch.page_tables.emplace_back(count);
    most_pages = std::max(most_pages, count);
    for (int32_t& page : p.batch.page_tables.back()) page = pages++;
  }
  // Shuffled: page i moves to i * step mod prime.
  int32_t total = pages + 1;
  const auto prime = [](int32_t n) {
    for (int32_t i = 2; i * i <= n; ++i) {
      if (n % i == 0) return false;
    }
    return true;
  };
  while (!prime(total)) ++total;
  p.k = device_.Zeros(dtype(), {total, page_size, heads.kv_heads, heads.head_dim});
  p.v = device_.Zeros(dtype(), {total, page_size, heads.kv_heads, heads.head_dim});
  Fill(p.k.view(), std::numeric_limits<double>::quiet_NaN());
  Fill(p.v.view(), std::numeric_limits<double>::quiet_NaN());
  p.page_tables = device_.Zeros(DType::kI32, {static_cast<int64_t>(sequences.size()), most_pages});
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (size_t i = 0; i < p.batch.page_tables[s].size(); ++i) {
      int32_t& page = p.batch.page_tables[s][i];
      page = (page * 5 + 1) % total;
      p.page_tables.view().row<int32_t>(s)[i] = page;
      const int64_t used =
          std::min<int64_t>(page_size, sequences[s].kv_len - static_cast<int64_t>(i) * page_size);
      // Position p of sequence s has the same keys whatever the page size.
      for (int64_t slot = 0; slot < used; ++slot) {
        const uint64_t seed = 1000000 * (s + 1) + i * page_size + slot;
        const Shape token = {heads.kv_heads, heads.head_dim};
        const int64_t at =
            (page * page_size + slot) * heads.kv_heads * heads.head_dim * SizeOf(dtype());
        FillRandom(TensorView(p.k.view().as<char>() + at, dtype(), token), 2 * seed);
        FillRandom(TensorView(p.v.view().as<char>() + at, dtype(), token), 2 * seed + 1);
      }
    }
  }
  p.q = device_.Random(dtype(), {tokens, heads.q_heads * heads.head_dim}, 3, 2.0);
  p.cu_q_lens = device_.From(p.batch.cu_q_lens);
  p.kv_lens = device_.From(p.batch.kv_lens);
  return p;
}

void AttentionTest::CompareWithReference(const Problem& problem, int64_t page_size,
                                         const AttentionShape& shape) {
  const Tensor out = Run(problem, shape);
  const reference::Cache cache{page_size, ToDoubles(problem.k.view()), ToDoubles(problem.v.view())};
  const auto expected = reference::PagedAttention(problem.heads, ToDoubles(problem.q.view()), cache,
                                                  problem.batch, shape.scale, shape.sliding_window);
  // Results are averages of values below 1. A score's error (head_dim products of up to 2 times the
  // scale) is a relative error of its weight; rescaling adds a few roundings for each block of 32
  // keys, far fewer than head_dim here. Tensor cores take the weights rounded to the type.
  const double rounded_weights = dtype() == DType::kF32 ? 0.0 : UnitRoundoff(dtype()) * 0x1p24;
  ExpectClose(out.view(), expected,
              4 * problem.heads.head_dim + 32 + static_cast<int64_t>(rounded_weights), 2.0);
}

TEST_P(AttentionTest, EqualsReferenceOnARaggedBatch) {
  // Decodes, prefills, chunks in the middle, an idle sequence, and lengths around 32 keys and the
  // page.
  const std::vector<Sequence> sequences = {{1, 1}, {1, 32}, {1, 33}, {5, 5},   {31, 31}, {33, 40},
                                           {0, 7}, {2, 64}, {1, 97}, {40, 65}, {3, 200}};
  for (int64_t page_size : {1, 7, 16, 64}) {
    for (const reference::Heads& heads :
         {reference::Heads{2, 2, 16}, {4, 2, 64}, {8, 2, 20}, {3, 1, 128}}) {
      SCOPED_TRACE(::testing::Message() << "page " << page_size << " D " << heads.head_dim);
      const AttentionShape shape{1.0f / std::sqrt(static_cast<float>(heads.head_dim)), 0};
      CompareWithReference(Make(heads, sequences, page_size), page_size, shape);
    }
  }
}

TEST_P(AttentionTest, EveryHeadDimEqualsReferenceOverSeveralSplits) {
  // Around the tiles of 32 and 64 keys and the splits of 256 that some backends cut the keys into.
  const std::vector<Sequence> sequences = {{1, 255}, {1, 256}, {1, 257},
                                           {7, 514}, {0, 0},   {70, 300}};
  for (const reference::Heads& heads :
       {reference::Heads{4, 1, 64}, {2, 1, 80}, {2, 2, 96}, {8, 1, 128}, {2, 1, 256}}) {
    SCOPED_TRACE(::testing::Message() << "D " << heads.head_dim);
    const AttentionShape shape{1.0f / std::sqrt(static_cast<float>(heads.head_dim)), 0};
    CompareWithReference(Make(heads, sequences, 16), 16, shape);
  }
}

TEST_P(AttentionTest, SlidingWindowOverSeveralSplitsEqualsReference) {
  for (int64_t window : {64, 200, 256, 300}) {
    SCOPED_TRACE(window);
    CompareWithReference(Make({2, 1, 64}, {{1, 600}, {2, 257}, {130, 520}}, 16), 16,
                         {0.2f, window});
  }
}

TEST_P(AttentionTest, SlidingWindowEqualsReference) {
  const std::vector<Sequence> sequences = {{1, 100}, {70, 90}, {20, 20}, {1, 10}, {3, 65}};
  for (int64_t window : {1, 2, 31, 32, 33, 64, 1000}) {
    SCOPED_TRACE(window);
    CompareWithReference(Make({4, 1, 32}, sequences, 8), 8, {0.2f, window});
  }
}

TEST_P(AttentionTest, WideGroupsAndLargeScoresStayFinite) {
  // 40 query heads on one kv head are more rows than a block holds; scores reach 2 * 16 * 30.
  const Problem problem = Make({40, 1, 16}, {{3, 50}, {1, 80}}, 16);
  const Tensor out = Run(problem, {30.0f, 0});
  for (double value : ToDoubles(out.view())) ASSERT_LE(std::abs(value), 1.01);
}

TEST_P(AttentionTest, GroupsWiderThanAnMmaEqualReference) {
  CompareWithReference(Make({40, 1, 64}, {{3, 270}, {1, 300}, {8, 20}}, 16), 16, {0.2f, 0});
}

TEST_P(AttentionTest, WholePrefillEqualsTokenByToken) {
  for (const int64_t head_dim : {24, 64}) {
    for (int64_t window : {0, 40}) {
      const AttentionShape shape{0.25f, window};
      const Problem whole = Make({4, 2, head_dim}, {{300, 300}}, 16);
      const Tensor expected = Run(whole, shape);
      for (const int32_t t : {0, 1, 30, 31, 32, 63, 64, 65, 100, 191, 192, 255, 256, 257, 299}) {
        ExpectSameBits(RunPart(whole, t, t + 1, shape).view(), expected.view().Rows(t, 1));
      }
    }
  }
}

// Beyond 8,192 keys splits grow: those of the decode kernel's blocks and those at whose end a
// prefill block folds are still the same.
TEST_P(AttentionTest, LongSequencesEqualReference) {
  for (const int64_t window : {0, 3000}) {
    if (kSanitizer && window == 0) continue;  // the same code over more keys
    CompareWithReference(Make({2, 1, 64}, {{1, 9000}, {3, 8300}}, 16), 16, {0.25f, window});
  }
}

// Chunks end anywhere: a block's rows then see the keys of different tiles, of which those that a
// row does not see must leave no trace in it. Scores are large, so that weights are rounded.
TEST_P(AttentionTest, ChunksOfAPromptHaveTheBitsOfTheWhole) {
  for (const auto& heads : {reference::Heads{4, 2, 64}, {2, 2, 64}}) {
    for (int64_t window : {0, 40}) {
      SCOPED_TRACE(::testing::Message() << heads.q_heads << " heads, window " << window);
      const AttentionShape shape{1.3f, window};
      const Problem whole = Make(heads, {{330, 330}}, 16);
      const Tensor expected = Run(whole, shape);
      int32_t begin = 0;
      for (const int32_t end : {40, 130, 131, 139, 250, 257, 330}) {
        ExpectSameBits(RunPart(whole, begin, end, shape).view(),
                       expected.view().Rows(begin, end - begin));
        begin = end;
      }
    }
  }
}

TEST_P(AttentionTest, ARowsBitsDoNotDependOnTheBatchThePagesOrTheThreads) {
  const AttentionShape shape{0.125f, 0};
  const Problem batch = Make({8, 2, 64}, {{4, 300}, {1, 77}, {50, 50}}, 16);
  const Tensor together = Run(batch, shape);
  const Problem other_pages = Make({8, 2, 64}, {{4, 300}, {1, 77}, {50, 50}}, 9);
  ExpectSameBits(Run(other_pages, shape).view(), together.view());
  for (size_t s = 0; s < 3; ++s) {
    const int32_t begin = batch.batch.cu_q_lens[s], count = batch.batch.cu_q_lens[s + 1] - begin;
    const Tensor out = device_.Zeros(dtype(), {count, 8 * 64});
    const Tensor cu = device_.From(std::vector<int32_t>{0, count});
    const Tensor len = device_.From(std::vector<int32_t>{batch.batch.kv_lens[s]});
    PagedKv kv = batch.kv();
    kv.page_tables = batch.page_tables.view().Rows(s, 1);
    PagedAttention(stream(), batch.q.view().Rows(begin, count), kv, cu.view(), len.view(), shape,
                   out.view());
    ExpectSameBits(out.view(), together.view().Rows(begin, count));
  }
  if (GetParam().device.gpu()) return;  // it has no threads to differ in
  const TestDevice three(3);
  const Tensor out = three.Zeros(dtype(), batch.q.view().shape);
  PagedAttention(three.stream(), batch.q.view(), batch.kv(), batch.cu_q_lens.view(),
                 batch.kv_lens.view(), shape, out.view());
  ExpectSameBits(out.view(), together.view());
}

// One workspace serves all batches of a server: partial results of a small one used to lie where a
// large one has its counters, whose sequences then never came to an end.
TEST_P(AttentionTest, OneWorkspaceServesSmallAndLargeBatchesInTurn) {
  const reference::Heads heads{2, 2, 64};
  constexpr int kSequences = 36;  // more than 64 counters, which are 256 bytes
  const Problem small = Make(heads, {{1, 600}}, 16);
  const Problem large = Make(heads, std::vector<Sequence>(kSequences, {1, 257}), 16);
  const int64_t table = std::max(small.page_tables.view().dim(1), large.page_tables.view().dim(1));
  const int64_t bytes = AttentionWorkspaceBytes(stream(), {.dtype = dtype(),
                                                           .sequences = kSequences,
                                                           .q_heads = heads.q_heads,
                                                           .kv_heads = heads.kv_heads,
                                                           .head_dim = heads.head_dim,
                                                           .max_kv_len = table * 16});
  if (bytes == 0) return;  // a device, or a type, without a workspace
  const Tensor workspace = device_.Zeros(DType::kU8, {bytes});
  AttentionShape shape{.scale = 0.125f};
  const Tensor small_alone = RunOnce(small, shape), large_alone = RunOnce(large, shape);
  shape.workspace = workspace.view();
  for (int round = 0; round < 2; ++round) {
    ExpectSameBits(RunOnce(small, shape).view(), small_alone.view());
    ExpectSameBits(RunOnce(large, shape).view(), large_alone.view());
  }
}

TEST_P(AttentionTest, ReadsQueriesFromColumnsOfAWiderMatrix) {
  const Problem problem = Make({2, 1, 16}, {{6, 20}}, 4);
  const Tensor expected = Run(problem, {0.25f, 0});
  const Tensor wide = device_.Random(dtype(), {6, 64}, 9), out = device_.Zeros(dtype(), {6, 50});
  for (int64_t t = 0; t < 6; ++t) {
    stream().Copy(wide.view().Columns(16, 32).Rows(t, 1).data, problem.q.view().Rows(t, 1).data,
                  32 * SizeOf(dtype()));
  }
  PagedAttention(stream(), wide.view().Columns(16, 32), problem.kv(), problem.cu_q_lens.view(),
                 problem.kv_lens.view(), {0.25f, 0}, out.view().Columns(10, 32));
  ExpectSameBits(out.view().Columns(10, 32), expected.view());
}

INSTANTIATE_TEST_SUITE_P(Devices, AttentionTest, ::testing::ValuesIn(KernelCases()), CaseName);

}  // namespace
}  // namespace trireme
