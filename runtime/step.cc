#include "runtime/step.h"

#include <algorithm>
#include <utility>

#include "runtime/wire.h"

namespace trireme {

void StepPlan::Clear() {
  step = 0;
  stop = false;
  new_sequences.clear();
  page_copies.clear();
  chunks.clear();
  tokens.clear();
  pages.clear();
}

namespace {

int64_t ReservedTokens(const PlanBounds& bounds) {
  return bounds.max_num_batched_tokens +
         std::min(bounds.max_num_seqs * bounds.max_model_len, kReservedTokens);
}

// Each sequence may begin and end in the middle of a page.
int64_t ReservedPages(const PlanBounds& bounds) {
  return ReservedTokens(bounds) / bounds.page_size + 2 * bounds.max_num_seqs;
}

}  // namespace

void StepPlan::Reserve(const PlanBounds& bounds) {
  new_sequences.reserve(bounds.max_num_seqs);
  page_copies.reserve(bounds.max_num_seqs);
  chunks.reserve(bounds.max_num_seqs);
  tokens.reserve(ReservedTokens(bounds));
  pages.reserve(ReservedPages(bounds));
}

size_t ReservedBytes(const PlanBounds& bounds) {
  constexpr size_t kHead = 64;  // the step's number, and the lists' lengths
  return kHead + bounds.max_num_seqs * (sizeof(NewSequence) + sizeof(PageCopy) + sizeof(Chunk)) +
         ReservedTokens(bounds) * sizeof(TokenId) + ReservedPages(bounds) * sizeof(int32_t);
}

void StepResult::Clear() {
  step = 0;
  sampled.clear();
  logits.clear();
  hidden.clear();
  error.clear();
}

namespace {

// One by one: between them lies padding, and the same plan is the same bytes.
template <typename Sequence, typename Field>
void ForEachField(Sequence& sequence, const Field& field) {
  field(sequence.slot);
  field(sequence.prompt_tokens);
  field(sequence.computed_tokens);
  field(sequence.num_pages);
  auto& sampling = sequence.sampling;
  field(sampling.temperature);
  field(sampling.top_k);
  field(sampling.top_p);
  field(sampling.min_p);
  field(sampling.repetition_penalty);
  field(sampling.presence_penalty);
  field(sampling.frequency_penalty);
  field(sampling.seed);
  field(sampling.logprobs);
}

}  // namespace

void Serialize(const StepPlan& plan, std::string* bytes) {
  ByteWriter out(std::move(*bytes));
  out.Put(plan.step);
  out.Put(plan.stop);
  out.Put(static_cast<uint64_t>(plan.new_sequences.size()));
  for (const NewSequence& sequence : plan.new_sequences)
    ForEachField(sequence, [&out](const auto& field) { out.Put(field); });
  out.PutVector(plan.page_copies);
  out.PutVector(plan.chunks);
  out.PutVector(plan.tokens);
  out.PutVector(plan.pages);
  *bytes = out.Take();
}

void Parse(const std::string& bytes, StepPlan* plan) {
  ByteReader in(bytes);
  plan->step = in.Get<int64_t>();
  plan->stop = in.Get<bool>();
  plan->new_sequences.resize(in.Get<uint64_t>());
  for (NewSequence& sequence : plan->new_sequences)
    ForEachField(sequence, [&in](auto& field) { field = in.Get<std::decay_t<decltype(field)>>(); });
  in.GetVector(&plan->page_copies);
  in.GetVector(&plan->chunks);
  in.GetVector(&plan->tokens);
  in.GetVector(&plan->pages);
}

void Serialize(const StepResult& result, std::string* bytes) {
  ByteWriter out(std::move(*bytes));
  out.Put(result.step);
  out.Put(static_cast<uint32_t>(result.sampled.size()));
  for (const SampledToken& sampled : result.sampled) {
    out.Put(sampled.token);
    out.Put(sampled.logprob);
    out.Put(static_cast<uint32_t>(sampled.top.size()));
    for (const auto& [token, logprob] : sampled.top) {
      out.Put(token);
      out.Put(logprob);
    }
  }
  out.PutVector(result.logits);
  out.PutVector(result.hidden);
  out.PutString(result.error);
  *bytes = out.Take();
}

void Parse(const std::string& bytes, StepResult* result) {
  ByteReader in(bytes);
  result->step = in.Get<int64_t>();
  result->sampled.resize(in.Get<uint32_t>());
  for (SampledToken& sampled : result->sampled) {
    sampled.token = in.Get<TokenId>();
    sampled.logprob = in.Get<float>();
    sampled.top.resize(in.Get<uint32_t>());
    for (auto& [token, logprob] : sampled.top) {
      token = in.Get<TokenId>();
      logprob = in.Get<float>();
    }
  }
  in.GetVector(&result->logits);
  in.GetVector(&result->hidden);
  result->error = in.GetString();
}

}  // namespace trireme
