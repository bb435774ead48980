#include "runtime/step.h"

#include "runtime/wire.h"

namespace trireme {

std::string Serialize(const StepPlan& plan) {
  ByteWriter out;
  out.Put(plan.step);
  out.Put(plan.stop);
  out.PutVector(plan.new_sequences);
  out.Put(static_cast<uint32_t>(plan.chunks.size()));
  for (const Chunk& chunk : plan.chunks) {
    out.Put(chunk.slot);
    out.Put(chunk.position);
    out.Put(chunk.logit_rows);
    out.Put(chunk.decode);
    out.PutVector(chunk.tokens);
    out.PutVector(chunk.new_pages);
  }
  return out.Take();
}

StepPlan ParseStepPlan(const std::string& bytes) {
  ByteReader in(bytes);
  StepPlan plan;
  plan.step = in.Get<int64_t>();
  plan.stop = in.Get<bool>();
  plan.new_sequences = in.GetVector<NewSequence>();
  plan.chunks.resize(in.Get<uint32_t>());
  for (Chunk& chunk : plan.chunks) {
    chunk.slot = in.Get<int32_t>();
    chunk.position = in.Get<int32_t>();
    chunk.logit_rows = in.Get<LogitRows>();
    chunk.decode = in.Get<bool>();
    chunk.tokens = in.GetVector<TokenId>();
    chunk.new_pages = in.GetVector<int32_t>();
  }
  return plan;
}

std::string Serialize(const StepResult& result) {
  ByteWriter out;
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
  out.PutString(result.error);
  return out.Take();
}

StepResult ParseStepResult(const std::string& bytes) {
  ByteReader in(bytes);
  StepResult result;
  result.step = in.Get<int64_t>();
  result.sampled.resize(in.Get<uint32_t>());
  for (SampledToken& sampled : result.sampled) {
    sampled.token = in.Get<TokenId>();
    sampled.logprob = in.Get<float>();
    sampled.top.resize(in.Get<uint32_t>());
    for (auto& [token, logprob] : sampled.top) {
      token = in.Get<TokenId>();
      logprob = in.Get<float>();
    }
  }
  result.logits = in.GetVector<float>();
  result.error = in.GetString();
  return result;
}

}  // namespace trireme
