// After warm-up a step allocates nothing on any rank: planning, the plan's message, the batch, the
// forward pass, sums and hidden states between ranks, sampling in all its ways, the result, and
// committing it; whether sequences only decode, or start, find their beginnings computed, are
// preempted and end. What MPI allocates inside its own calls is MPI's; what a request needs is
// allocated when it comes. Log-probabilities are lists made for the caller, and are left out.

#include <gtest/gtest.h>
#include <mpi.h>

#include <cerrno>
#include <cstdlib>
#include <random>

#include "runtime/graph_cache.h"
#include "runtime/scheduler.h"
#include "runtime/step_pipeline.h"
#include "tests/parallel/world.h"
#include "tests/runtime/engine_fixture.h"
#include "tests/runtime/fake_ranks.h"
#include "tests/runtime/recording_stream.h"

namespace {

constexpr int64_t kWarmUpSteps = 300, kSteps = 480;

// Of the thread that runs the steps: MPI has threads of its own.
thread_local int64_t t_allocations = 0;
thread_local int t_not_counted = 0;
int64_t g_messages = 0, g_before = 0, g_after = 0;

void Count() {
  if (t_not_counted == 0) ++t_allocations;
}
struct NotCounted {
  NotCounted() { ++t_not_counted; }
  ~NotCounted() { --t_not_counted; }
};

}  // namespace

// glibc's allocator, counted. operator new and the devices' memory come from here too.
extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* data, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void* malloc(size_t bytes) { return Count(), __libc_malloc(bytes); }
void* calloc(size_t count, size_t bytes) { return Count(), __libc_calloc(count, bytes); }
void* realloc(void* data, size_t bytes) { return Count(), __libc_realloc(data, bytes); }
void* memalign(size_t alignment, size_t bytes) {
  return Count(), __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  return Count(), __libc_memalign(alignment, bytes);
}
int posix_memalign(void** data, size_t alignment, size_t bytes) {
  Count();
  *data = __libc_memalign(alignment, bytes);
  return *data == nullptr ? ENOMEM : 0;
}

// MPI's profiling interface: the calls that steps make.
int MPI_Isend(const void* data, int count, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
              MPI_Request* request) {
  const NotCounted inside;
  return PMPI_Isend(data, count, type, peer, tag, comm, request);
}
int MPI_Recv(void* data, int count, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
             MPI_Status* status) {
  const NotCounted inside;
  return PMPI_Recv(data, count, type, peer, tag, comm, status);
}
int MPI_Test(MPI_Request* request, int* done, MPI_Status* status) {
  const NotCounted inside;
  return PMPI_Test(request, done, status);
}
int MPI_Iprobe(int peer, int tag, MPI_Comm comm, int* found, MPI_Status* status) {
  const NotCounted inside;
  return PMPI_Iprobe(peer, tag, comm, found, status);
}
int MPI_Improbe(int peer, int tag, MPI_Comm comm, int* found, MPI_Message* message,
                MPI_Status* status) {
  const NotCounted inside;
  return PMPI_Improbe(peer, tag, comm, found, message, status);
}
// Ranks other than the leader receive one message a step.
int MPI_Mrecv(void* data, int count, MPI_Datatype type, MPI_Message* message, MPI_Status* status) {
  const NotCounted inside;
  if (++g_messages == kWarmUpSteps) g_before = t_allocations;
  if (g_messages == kSteps) g_after = t_allocations;
  return PMPI_Mrecv(data, count, type, message, status);
}
}

namespace trireme {
namespace {

// Every way of choosing a token.
std::vector<Request> Requests() {
  std::vector<Request> requests(16);
  for (size_t i = 0; i < requests.size(); ++i) {
    Request& request = requests[i];
    request.id = i;
    request.prompt = {1, 403, 407, static_cast<TokenId>(3 + i)};
    request.max_tokens = 500;
    request.stop_tokens = {-2};
    SamplingParams& sampling = request.sampling;
    sampling.seed = i;
    if (i % 8 > 0) sampling.temperature = 0.9f;
    if (i % 8 == 2) sampling.top_k = 40;
    if (i % 8 == 3) sampling.top_p = 0.9f;
    if (i % 8 == 4) sampling.min_p = 0.05f;
    if (i % 8 == 5) sampling.repetition_penalty = 1.2f;
    if (i % 8 == 6) sampling.top_p = 0.95f, sampling.frequency_penalty = 0.1f;
  }
  return requests;
}

// Requests without end that keep a scheduler busy: they begin alike, are short, and some have
// several samples, which share a page that one of them must copy.
class Traffic {
 public:
  explicit Traffic(Scheduler* scheduler) : scheduler_(scheduler) {}
  // What Add allocates is the request's own.
  void KeepWaiting(int64_t samples) {
    const NotCounted adding;
    while (scheduler_->waiting() < samples) ASSERT_TRUE(scheduler_->Add(Next()).ok());
  }

 private:
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  Request Next() {
    Request request = Requests()[next_id_ % 16];
    request.id = next_id_++;
    request.prompt.clear();
    const int64_t prefix = Between(0, 2), shared = 16 * Between(0, 2);
    for (int64_t i = 0; i < shared; ++i)
      request.prompt.push_back(static_cast<TokenId>(3 + 7 * prefix + i));
    for (int64_t i = Between(1, 20); i > 0; --i)
      request.prompt.push_back(static_cast<TokenId>(Between(3, 500)));
    request.max_tokens = Between(1, 60);
    request.n = next_id_ % 8 == 0 ? 2 : 1;
    request.priority = static_cast<int32_t>(Between(0, 2));
    return request;
  }

  Scheduler* scheduler_;
  std::mt19937_64 random_{1};
  uint64_t next_id_ = 0;
};

// What happened while allocations were counted.
void ExpectAllHappened(const SchedulerStats& before, const SchedulerStats& after) {
  EXPECT_GT(after.prompt_tokens, before.prompt_tokens) << "nobody was admitted";
  EXPECT_GT(after.preemptions, before.preemptions);
  EXPECT_GT(after.cached_tokens, before.cached_tokens);
  EXPECT_GT(after.page_copies, before.page_copies);
}

// As the engine does it: as many steps in flight as there are stages, and one planned ahead.
void Lead(Worker& worker, bool traffic) {
  SchedulerOptions options;
  options.micro_batches = worker.groups().topology.pp_size;
  options.lookahead = options.micro_batches == 1 ? 1 : 0;
  options.max_num_seqs = worker.options().max_num_seqs;
  options.max_num_batched_tokens = worker.options().max_num_batched_tokens;
  options.max_model_len = worker.options().max_model_len;
  options.num_pages = worker.options().num_pages;
  Scheduler scheduler(options);
  Traffic requests(&scheduler);
  if (!traffic) {
    for (const Request& request : Requests()) ASSERT_TRUE(scheduler.Add(request).ok());
  }
  StepPipeline pipeline(worker);
  std::vector<StepPlan> plans(options.micro_batches + options.lookahead);
  StepResult result;
  std::vector<TokenEvent> events;
  SchedulerStats warm;
  for (int64_t step = 0; step < kSteps; ++step) {
    StepPlan& plan = plans[step % plans.size()];
    if (step >= static_cast<int64_t>(plans.size())) {
      pipeline.Take(&result);
      events.clear();
      scheduler.Commit(plan, result, &events);
      ASSERT_TRUE(traffic || !events.empty());
    }
    if (traffic) requests.KeepWaiting(4);
    ASSERT_TRUE(scheduler.Next(&plan));
    pipeline.Dispatch(plan);
    if (step + 1 == kWarmUpSteps) warm = scheduler.stats(), g_before = t_allocations;
  }
  g_after = t_allocations;
  if (traffic) ExpectAllHappened(warm, scheduler.stats());
}

void ExpectStepsAllocateNothing(const WorkerOptions& options, bool traffic) {
  for (const Topology& topology : LayoutsOf(World().size())) {
    SCOPED_TRACE(NameOf(topology));
    g_messages = 0;
    g_before = g_after = -1;
    WithWorker("stories260K", topology, options,
               [traffic](Worker& worker) { Lead(worker, traffic); });
    EXPECT_GT(g_before, 0) << "nothing was counted";
    EXPECT_EQ(g_after - g_before, 0)
        << "allocations in " << kSteps - kWarmUpSteps << " steps on rank " << World().rank();
  }
}

TEST(AllocationTest, StepsAllocateNothing) {
  WorkerOptions options;
  options.max_num_seqs = 16;
  ExpectStepsAllocateNothing(options, /*traffic=*/false);
}

TEST(AllocationTest, StepsOfChangingSequencesAllocateNothing) {
  WorkerOptions options;
  options.max_num_seqs = 16;
  options.max_num_batched_tokens = 64;
  options.num_pages = 40;  // for 16 sequences of 40 tokens: some are preempted
  ExpectStepsAllocateNothing(options, /*traffic=*/true);
}

// All pages hold something, and each new one takes another's: the table fills up with what was
// erased. With these sizes it would be as full as it may be without growing.
TEST(AllocationTest, PagesThatAreTakenForOthersAllocateNothing) {
  for (const int64_t pages : {2, 6, 13, 27, 223, 447}) {
    PrefixCache cache(pages, 1);
    const int64_t before = t_allocations;
    for (TokenId token = 0; token < 1000 * pages; ++token) {
      const int32_t page = cache.Allocate();
      cache.Insert(PrefixCache::kStart, {&token, 1}, page);
      cache.Release(page);
    }
    EXPECT_EQ(t_allocations - before, 0) << pages;
  }
}

// Without ranks, so that there are enough steps for what is rare, as more sequences that end than
// were ever unused before.
void ExpectPlanningAllocatesNothing(const SchedulerOptions& options) {
  constexpr size_t kPlans = 3000;
  Scheduler scheduler(options);
  FakeRanks ranks(options);
  Traffic requests(&scheduler);
  std::vector<StepPlan> plans(options.micro_batches + options.lookahead);
  std::vector<StepResult> results(plans.size());
  std::vector<TokenEvent> events;
  events.reserve(options.max_num_seqs);
  size_t planned = 0, committed = 0;
  int64_t before = -1;
  SchedulerStats warm;
  while (planned < kPlans || !scheduler.idle()) {
    if (planned < kPlans) requests.KeepWaiting(300);
    // Each plan's first use makes room in it.
    if (planned == plans.size() && before < 0) warm = scheduler.stats(), before = t_allocations;
    if (planned - committed < plans.size() && scheduler.Next(&plans[planned % plans.size()])) {
      const NotCounted executing;
      ranks.Execute(plans[planned % plans.size()], &results[planned % plans.size()]);
      ++planned;
      continue;
    }
    ASSERT_LT(committed, planned) << "nothing is planned and nothing is in flight";
    const StepPlan& plan = plans[committed % plans.size()];
    events.clear();
    scheduler.Commit(plan, results[committed++ % plans.size()], &events);
    const NotCounted executing;
    ranks.Commit(plan);
  }
  EXPECT_EQ(t_allocations - before, 0);
  EXPECT_EQ(ranks.error(), "");
  ExpectAllHappened(warm, scheduler.stats());
}

TEST(AllocationTest, PlanningAllocatesNothing) {
  SchedulerOptions options;
  options.max_num_seqs = 100;
  options.max_num_batched_tokens = 400;
  options.max_model_len = 128;
  options.num_pages = 200;
  options.lookahead = 1;
  ExpectPlanningAllocatesNothing(options);
  options.lookahead = 0;
  options.micro_batches = 3;
  ExpectPlanningAllocatesNothing(options);
}

// Of replays a CPU has none; what is theirs besides the driver's own is the same on any stream.
TEST(AllocationTest, ReplaysAllocateNothing) {
  HostDevice device;
  RecordingStream stream(&device);
  int32_t in = 0, out = 0;
  GraphCache graphs(GraphCache::Options{});
  const auto work = [&] { stream.Enqueue([&] { out = 2 * in; }); };
  const GraphTrial trial{.fill = [&](int round) { in = round + 1; },
                         .work = work,
                         .outputs = {ConstTensorView(&out, DType::kI32, {1})}};
  ASSERT_TRUE(graphs.Capture(stream, {.work = "double", .size = 1}, trial));
  const int64_t before = t_allocations;
  for (in = 0; in < 100; ++in) {
    graphs.Run(stream, {.work = "double", .size = 1}, [&] { work(); });
    graphs.Run(stream, {.work = "double", .size = 2}, [&] { out = 0; });
    graphs.RunEagerly(EagerReason::kPrompt, [&] { out = 0; });
  }
  EXPECT_EQ(t_allocations - before, 0);
  EXPECT_EQ(graphs.stats().replays, 100);
}

}  // namespace
}  // namespace trireme
