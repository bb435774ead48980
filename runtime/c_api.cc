// libtrireme.so: the C interface over ControlPlane, Worker and Engine. Catches what the C++ side
// may throw (bad_alloc) at its border; structs of older and newer callers are met by struct_size.

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status.h"
#include "models/memory_plan.h"
#include "runtime/engine.h"
#include "runtime/tokenizer.h"
#include "runtime/trireme.h"

struct trireme_session {
  std::unique_ptr<trireme::ControlPlane> control;
};

struct trireme_engine {
  std::unique_ptr<trireme::Worker> worker;
  std::unique_ptr<trireme::Tokenizer> tokenizer;  // leader; null where the model has none
  std::unique_ptr<trireme::Engine> engine;        // leader
};

namespace trireme {
namespace {

thread_local std::string g_last_error;

trireme_code Report(const absl::Status& status) {
  if (status.ok()) return TRIREME_OK;
  g_last_error = std::string(status.message());
  return static_cast<trireme_code>(status.raw_code());
}

// Runs `body`, which returns a Status; nothing gets out of here but a code.
template <typename Body>
trireme_code Guard(const Body& body) {
  try {
    return Report(body());
  } catch (const std::bad_alloc&) {
    return Report(absl::ResourceExhaustedError("out of memory"));
  } catch (const std::exception& error) {
    return Report(absl::InternalError(error.what()));
  }
}

// The caller's struct over the defaults: fields it does not know keep theirs.
template <typename Struct>
absl::Status Read(const Struct* given, const Struct& defaults, Struct* out) {
  *out = defaults;
  if (given == nullptr || given->struct_size < sizeof(size_t))
    return absl::InvalidArgumentError("struct_size is not set: use the _init function");
  std::memcpy(out, given, std::min(given->struct_size, sizeof(Struct)));
  return absl::OkStatus();
}
template <typename Struct>
void Write(const Struct& value, Struct* out, size_t struct_size) {
  std::memcpy(out, &value, std::min(struct_size, sizeof(Struct)));
  out->struct_size = struct_size;
}

trireme_engine_options DefaultOptions() {
  trireme_engine_options options{};
  options.struct_size = sizeof(options);
  options.device = "cpu";
  options.dtype = "auto";
  options.quantization = "none";
  options.max_num_seqs = 64;
  options.max_num_batched_tokens = 512;
  options.page_size = 16;
  options.prefix_cache = 1;
  options.graphs = 1;
  return options;
}

trireme_request DefaultRequest() {
  trireme_request request{};
  request.struct_size = sizeof(request);
  request.max_tokens = 16;
  request.n = 1;
  request.top_p = 1.0f;
  request.repetition_penalty = 1.0f;
  return request;
}

absl::Status CheckOptions(const trireme_engine_options& options) {
  if (options.model_dir == nullptr) return absl::InvalidArgumentError("model_dir is null");
  if (options.device == nullptr || options.dtype == nullptr || options.quantization == nullptr) {
    return absl::InvalidArgumentError(
        "device, dtype or quantization is null: use the _init function");
  }
  if (options.max_num_seqs < 1 || options.max_num_batched_tokens < 1 || options.page_size < 1 ||
      options.max_model_len < 0 || options.kv_cache_bytes < 0 || options.max_queue < 0 ||
      options.memory_limit < 0 || options.tp < 0 || options.pp < 0 || options.dp < 0 ||
      options.threads < 0) {
    return absl::InvalidArgumentError("an engine option is out of range: sizes are positive");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::optional<DType>> ParseDType(const std::string& text) {
  if (text == "auto") return std::optional<DType>();
  if (text == "f32") return std::optional(DType::kF32);
  if (text == "bf16") return std::optional(DType::kBF16);
  if (text == "f16") return std::optional(DType::kF16);
  return absl::InvalidArgumentError(absl::StrCat("dtype ", text, ": auto, f32, bf16 or f16"));
}

int CoresOfRank(const ControlPlane& control) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof(cores), &cores) != 0) return 1;
  return std::max(1, CPU_COUNT(&cores) / control.local_size());
}

absl::StatusOr<WorkerOptions> WorkerOptionsOf(const ControlPlane& control,
                                              const ModelConfig& config, const Topology& topology,
                                              const trireme_engine_options& given) {
  WorkerOptions options;
  options.device.name = given.device;
  options.device.threads = given.threads > 0 ? given.threads : CoresOfRank(control);
  options.device.local_index = control.local_rank();
  options.graphs = given.graphs != 0;
  ASSIGN_OR_RETURN(options.dtype, ParseDType(given.dtype));
  const std::optional<Quantization> quantization = QuantizationNamed(given.quantization);
  if (!quantization) {
    return absl::InvalidArgumentError(
        absl::StrCat("quantization ", given.quantization, ": none, fp8 or fp8-dynamic"));
  }
  options.quantization = *quantization;
  options.max_model_len = given.max_model_len;
  options.max_num_seqs = given.max_num_seqs;
  options.max_num_batched_tokens = given.max_num_batched_tokens;
  options.page_size = given.page_size;
  options.memory_limit = given.memory_limit;
  if (given.kv_cache_bytes > 0) {
    ASSIGN_OR_RETURN(options.num_pages,
                     PagesOfMemory(config, topology, options.dtype.value_or(config.dtype),
                                   given.page_size, given.kv_cache_bytes));
  }
  return options;
}

absl::Status Open(ControlPlane& control, const trireme_engine_options& given, trireme_engine* out) {
  absl::StatusOr<ModelConfig> config = LoadModelConfig(given.model_dir);
  RETURN_IF_ERROR(control.Agree(config.status()));
  const absl::StatusOr<Topology> topology = ResolveTopology(
      given.tp, given.pp, given.dp, control.size(), config->num_heads, config->num_layers,
      [&](int tp) { return CheckTensorParallel(*config, {.tp_size = tp}).ok(); });
  RETURN_IF_ERROR(control.Agree(topology.status()));
  absl::StatusOr<WorkerOptions> options = WorkerOptionsOf(control, *config, *topology, given);
  RETURN_IF_ERROR(control.Agree(options.status()));
  ASSIGN_OR_RETURN(out->worker,
                   Worker::Load(control, *topology, given.model_dir, *std::move(options)));
  const bool leads = control.rank() == out->worker->leader();
  absl::Status status;
  if (leads) {
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(given.model_dir);
    if (tokenizer.ok()) {
      out->tokenizer = *std::move(tokenizer);
    } else if (!absl::IsNotFound(tokenizer.status())) {
      status = tokenizer.status();
    }
  }
  if (leads && status.ok()) {
    auto engine =
        Engine::Create(*out->worker, out->tokenizer.get(),
                       {.prefix_cache = given.prefix_cache != 0, .max_queue = given.max_queue});
    status = engine.status();
    if (status.ok()) out->engine = *std::move(engine);
  }
  // Nobody goes to trireme_engine_run for a leader that has no engine.
  status = control.Agree(status);
  if (!status.ok()) out->engine.reset();
  return status;
}

absl::Status Leads(const trireme_engine* engine) {
  if (engine == nullptr) return absl::InvalidArgumentError("the engine is null");
  if (engine->engine == nullptr) {
    return absl::FailedPreconditionError(
        "this rank is not its replica's leader: it calls trireme_engine_run");
  }
  return absl::OkStatus();
}

// 0, none, stays 0; a sum beyond the clock's end is its end.
absl::StatusOr<int64_t> DeadlineOf(const Engine& engine, int64_t timeout_us) {
  if (timeout_us < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("timeout_us is ", timeout_us, "; it must be at least 0 (none)"));
  }
  if (timeout_us == 0) return 0;
  const int64_t now = engine.NowMicros();
  return now + std::min(timeout_us, std::numeric_limits<int64_t>::max() - now);
}

absl::StatusOr<Request> RequestOf(const trireme_engine& engine, const trireme_request& given) {
  Request request;
  request.id = given.id;
  if (given.prompt_ids != nullptr) {
    request.prompt.assign(given.prompt_ids, given.prompt_ids + given.prompt_length);
  } else if (given.prompt == nullptr) {
    return absl::InvalidArgumentError("prompt and prompt_ids are null: give one");
  } else if (engine.tokenizer == nullptr) {
    return absl::FailedPreconditionError("the model has no tokenizer: give prompt_ids");
  } else {
    ASSIGN_OR_RETURN(request.prompt, engine.tokenizer->Encode(given.prompt));
  }
  request.max_tokens = given.max_tokens;
  request.n = given.n;
  request.priority = given.priority;
  ASSIGN_OR_RETURN(request.deadline_us, DeadlineOf(*engine.engine, given.timeout_us));
  request.sampling.temperature = given.temperature;
  request.sampling.top_k = given.top_k;
  request.sampling.top_p = given.top_p;
  request.sampling.min_p = given.min_p;
  request.sampling.repetition_penalty = given.repetition_penalty;
  request.sampling.presence_penalty = given.presence_penalty;
  request.sampling.frequency_penalty = given.frequency_penalty;
  request.sampling.seed = given.seed;
  if (given.ignore_eos == 0) {
    const std::vector<int64_t>& eos = engine.worker->config().eos_token_ids;
    request.stop_tokens.assign(eos.begin(), eos.end());
  }
  if (given.stop_count > 0 && given.stop == nullptr)
    return absl::InvalidArgumentError("stop is null");
  for (size_t i = 0; i < given.stop_count; ++i) {
    if (given.stop[i] == nullptr) return absl::InvalidArgumentError("a stop string is null");
    request.stop.emplace_back(given.stop[i]);
  }
  return request;
}

void CallBack(const TokenOutput& output, trireme_callback callback, void* user_data) {
  const std::string error(output.status.message());
  trireme_output out{};
  out.struct_size = sizeof(out);
  out.request_id = output.request_id;
  out.sample = output.sample;
  out.token = output.sampled.token;
  out.text = output.text.c_str();
  out.text_length = output.text.size();
  out.finish = static_cast<trireme_finish>(output.finish);
  out.error = error.c_str();
  callback(&out, user_data);
}

static_assert(TRIREME_FINISH_ERROR == static_cast<int>(FinishReason::kError));
static_assert(TRIREME_RESOURCE_EXHAUSTED == static_cast<int>(absl::StatusCode::kResourceExhausted));
static_assert(TRIREME_ABORTED == static_cast<int>(absl::StatusCode::kAborted));
static_assert(TRIREME_DATA_LOSS == static_cast<int>(absl::StatusCode::kDataLoss));

}  // namespace
}  // namespace trireme

using namespace trireme;  // NOLINT: the functions below are outside of it by their nature

extern "C" {

int32_t trireme_abi_version(void) { return TRIREME_ABI_VERSION; }
const char* trireme_version(void) { return TRIREME_VERSION; }
const char* trireme_last_error(void) { return g_last_error.c_str(); }

trireme_code trireme_session_start(trireme_session** session) {
  return Guard([&]() -> absl::Status {
    if (session == nullptr) return absl::InvalidArgumentError("session is null");
    *session = nullptr;
    static bool started = false;
    if (std::exchange(started, true))
      return absl::FailedPreconditionError("a process has one session, and it has been started");
    auto out = std::make_unique<trireme_session>();
    ASSIGN_OR_RETURN(out->control, ControlPlane::Start(nullptr, nullptr));
    *session = out.release();
    return absl::OkStatus();
  });
}
int32_t trireme_session_rank(const trireme_session* session) { return session->control->rank(); }
int32_t trireme_session_size(const trireme_session* session) { return session->control->size(); }
void trireme_session_end(trireme_session* session) { delete session; }

void trireme_engine_options_init(trireme_engine_options* options, size_t struct_size) {
  Write(DefaultOptions(), options, struct_size);
}

trireme_code trireme_engine_open(trireme_session* session, const trireme_engine_options* options,
                                 trireme_engine** engine) {
  return Guard([&]() -> absl::Status {
    if (session == nullptr || engine == nullptr)
      return absl::InvalidArgumentError("session or engine is null");
    *engine = nullptr;
    trireme_engine_options given;
    absl::Status status = Read(options, DefaultOptions(), &given);
    if (status.ok()) status = CheckOptions(given);
    RETURN_IF_ERROR(session->control->Agree(status));
    auto out = std::make_unique<trireme_engine>();
    RETURN_IF_ERROR(Open(*session->control, given, out.get()));
    *engine = out.release();
    return absl::OkStatus();
  });
}

int32_t trireme_engine_leads(const trireme_engine* engine) { return engine->engine != nullptr; }

trireme_code trireme_engine_run(trireme_engine* engine) {
  return Guard([&]() -> absl::Status {
    if (engine == nullptr) return absl::InvalidArgumentError("the engine is null");
    if (engine->engine != nullptr)
      return absl::FailedPreconditionError("the leader submits requests instead");
    return engine->worker->Run();
  });
}

void trireme_engine_close(trireme_engine* engine) {
  if (engine == nullptr) return;
  engine->engine.reset();
  delete engine;
}

void trireme_request_init(trireme_request* request, size_t struct_size) {
  Write(DefaultRequest(), request, struct_size);
}

trireme_code trireme_submit(trireme_engine* engine, const trireme_request* request,
                            trireme_callback callback, void* user_data) {
  return Guard([&]() -> absl::Status {
    RETURN_IF_ERROR(Leads(engine));
    if (callback == nullptr) return absl::InvalidArgumentError("the callback is null");
    trireme_request given;
    RETURN_IF_ERROR(Read(request, DefaultRequest(), &given));
    ASSIGN_OR_RETURN(Request converted, RequestOf(*engine, given));
    return engine->engine->Submit(std::move(converted), [=](const TokenOutput& output) {
      CallBack(output, callback, user_data);
    });
  });
}

trireme_code trireme_cancel(trireme_engine* engine, uint64_t request_id) {
  return Guard([&]() -> absl::Status {
    RETURN_IF_ERROR(Leads(engine));
    return engine->engine->Cancel(request_id);
  });
}

trireme_code trireme_drain(trireme_engine* engine) {
  return Guard([&]() -> absl::Status {
    RETURN_IF_ERROR(Leads(engine));
    return engine->engine->Drain();
  });
}

trireme_code trireme_stats(const trireme_engine* engine, trireme_stats_data* stats) {
  return Guard([&]() -> absl::Status {
    RETURN_IF_ERROR(Leads(engine));
    if (stats == nullptr || stats->struct_size < sizeof(size_t))
      return absl::InvalidArgumentError("struct_size is not set");
    const EngineStats now = engine->engine->Stats();
    trireme_stats_data out{};
    out.steps = now.steps;
    out.prefill_tokens = now.prefill_tokens;
    out.decode_tokens = now.decode_tokens;
    out.requests = now.requests;
    out.refused = now.refused;
    out.overloaded = now.overloaded;
    out.preemptions = now.preemptions;
    out.waiting = now.waiting;
    out.running = now.running;
    out.pages = now.pages;
    out.pages_free = now.pages_free;
    out.pages_cached = now.pages_cached;
    out.cache_hit_rate = now.cache_hit_rate();
    Write(out, stats, stats->struct_size);
    return absl::OkStatus();
  });
}

trireme_code trireme_timeline(const trireme_engine* engine, uint64_t request_id,
                              trireme_timeline_data* timeline) {
  return Guard([&]() -> absl::Status {
    RETURN_IF_ERROR(Leads(engine));
    if (timeline == nullptr || timeline->struct_size < sizeof(size_t))
      return absl::InvalidArgumentError("struct_size is not set");
    ASSIGN_OR_RETURN(const RequestTimeline known, engine->engine->Timeline(request_id));
    trireme_timeline_data out{};
    out.request_id = known.request_id;
    out.finish = static_cast<trireme_finish>(known.finish);
    out.prompt_tokens = known.prompt_tokens;
    out.output_tokens = known.output_tokens;
    out.queue_us = known.queue_us;
    out.prefill_us = known.prefill_us;
    out.decode_us = known.decode_us;
    out.communication_us = known.communication_us;
    out.overhead_us = known.overhead_us;
    Write(out, timeline, timeline->struct_size);
    return absl::OkStatus();
  });
}

trireme_code trireme_metrics(const trireme_engine* engine, char* buffer, size_t* length) {
  return Guard([&]() -> absl::Status {
    RETURN_IF_ERROR(Leads(engine));
    if (length == nullptr) return absl::InvalidArgumentError("length is null");
    const std::string text = PrometheusText(engine->engine->Stats());
    const size_t room = std::exchange(*length, text.size());
    if (buffer == nullptr || room < text.size() + 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("the buffer has ", room, " bytes; the text takes ", text.size() + 1));
    }
    std::memcpy(buffer, text.c_str(), text.size() + 1);
    return absl::OkStatus();
  });
}

trireme_code trireme_encode(const trireme_engine* engine, const char* text, int32_t* ids,
                            size_t* count) {
  return Guard([&]() -> absl::Status {
    RETURN_IF_ERROR(Leads(engine));
    if (text == nullptr || count == nullptr)
      return absl::InvalidArgumentError("text or count is null");
    if (engine->tokenizer == nullptr)
      return absl::FailedPreconditionError("the model has no tokenizer");
    ASSIGN_OR_RETURN(const std::vector<TokenId> tokens, engine->tokenizer->Encode(text));
    const size_t room = std::exchange(*count, tokens.size());
    if (ids == nullptr || room < tokens.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("there is room for ", room, " ids; the text has ", tokens.size()));
    }
    std::copy(tokens.begin(), tokens.end(), ids);
    return absl::OkStatus();
  });
}

}  // extern "C"
