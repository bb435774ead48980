#include "tests/reference/reference.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace trireme::reference {

Doubles Embedding(const std::vector<int32_t>& ids, const Doubles& table, int64_t hidden,
                  int64_t vocab_begin) {
  const int64_t vocab = static_cast<int64_t>(table.size()) / hidden;
  Doubles out;
  for (int32_t id : ids) {
    const int64_t row = id - vocab_begin;
    for (int64_t i = 0; i < hidden; ++i)
      out.push_back(row >= 0 && row < vocab ? table[row * hidden + i] : 0.0);
  }
  return out;
}

Doubles RmsNorm(const Doubles& x, const Doubles& weight, double eps) {
  const size_t h = weight.size();
  Doubles out(x.size());
  for (size_t row = 0; row < x.size(); row += h) {
    double squares = 0;
    for (size_t i = 0; i < h; ++i) squares += x[row + i] * x[row + i];
    const double rms = std::sqrt(squares / static_cast<double>(h) + eps);
    for (size_t i = 0; i < h; ++i) out[row + i] = x[row + i] / rms * weight[i];
  }
  return out;
}

Doubles LayerNorm(const Doubles& x, const Doubles& weight, const Doubles& bias, double eps) {
  const size_t h = weight.size();
  Doubles out(x.size());
  for (size_t row = 0; row < x.size(); row += h) {
    double mean = 0, variance = 0;
    for (size_t i = 0; i < h; ++i) mean += x[row + i] / static_cast<double>(h);
    for (size_t i = 0; i < h; ++i)
      variance += (x[row + i] - mean) * (x[row + i] - mean) / static_cast<double>(h);
    for (size_t i = 0; i < h; ++i) {
      out[row + i] = (x[row + i] - mean) / std::sqrt(variance + eps) * weight[i];
      if (!bias.empty()) out[row + i] += bias[i];
    }
  }
  return out;
}

Doubles Add(const Doubles& x, const Doubles& delta) {
  Doubles out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] + delta[i];
  return out;
}

Doubles MatMul(const Doubles& x, const Doubles& w, const Doubles& bias, int64_t k) {
  const int64_t rows = static_cast<int64_t>(x.size()) / k, n = static_cast<int64_t>(w.size()) / k;
  Doubles y;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias.empty() ? 0.0 : bias[j];
      for (int64_t i = 0; i < k; ++i) sum += x[t * k + i] * w[j * k + i];
      y.push_back(sum);
    }
  }
  return y;
}

Doubles RoundActivations(const Doubles& x, int64_t k) {
  Doubles out;
  for (size_t row = 0; row < x.size(); row += k) {
    double scale = std::ldexp(1.0, -112);
    for (int64_t i = 0; i < k; ++i) {
      while (std::abs(x[row + i]) > 448.0 * scale) scale *= 2.0;
    }
    for (int64_t i = 0; i < k; ++i) {
      const double q = x[row + i] / scale;
      const int exponent = q == 0.0 ? -6 : std::max(std::ilogb(q), -6);  // subnormal codes: 2^-6
      const double step = std::ldexp(1.0, exponent - 3);
      out.push_back(std::nearbyint(q / step) * step * scale);  // ties to even
    }
  }
  return out;
}

Doubles Gelu(const Doubles& x) {
  Doubles out;
  for (const double a : x) {
    const double inner = std::sqrt(2.0 / std::numbers::pi) * (a + 0.044715 * a * a * a);
    out.push_back(0.5 * a * (1.0 + std::tanh(inner)));
  }
  return out;
}

Doubles SiluAndMul(const Doubles& gate_up, int64_t intermediate) {
  Doubles out;
  for (size_t row = 0; row < gate_up.size(); row += 2 * intermediate) {
    for (int64_t i = 0; i < intermediate; ++i) {
      const double gate = gate_up[row + i], up = gate_up[row + intermediate + i];
      out.push_back(gate / (1.0 + std::exp(-gate)) * up);
    }
  }
  return out;
}

Doubles MatMulSwiGlu(const Doubles& x, const Doubles& w, const Doubles& bias, int64_t k) {
  const int64_t intermediate = static_cast<int64_t>(w.size()) / k / 2;
  Doubles y;
  for (size_t row = 0; row < x.size(); row += k) {
    for (int64_t j = 0; j < intermediate; ++j) {
      double gate = bias.empty() ? 0.0 : bias[j];
      double up = bias.empty() ? 0.0 : bias[intermediate + j];
      for (int64_t i = 0; i < k; ++i) {
        gate += x[row + i] * w[j * k + i];
        up += x[row + i] * w[(intermediate + j) * k + i];
      }
      y.push_back(gate / (1.0 + std::exp(-gate)) * up);
    }
  }
  return y;
}

Doubles GatherRows(const Doubles& x, const std::vector<int32_t>& indices, int64_t hidden) {
  Doubles out;
  for (int32_t index : indices) {
    for (int64_t i = 0; i < hidden; ++i) out.push_back(x[index * hidden + i]);
  }
  return out;
}

Doubles RotateHead(const Doubles& x, const Doubles& norm, double eps, const Doubles& cos_sin) {
  const Doubles in = norm.empty() ? x : RmsNorm(x, norm, eps);
  const size_t half = x.size() / 2;
  Doubles out(x.size());
  for (size_t i = 0; i < half; ++i) {
    const double cos = cos_sin[i], sin = cos_sin[half + i];
    out[i] = in[i] * cos - in[half + i] * sin;
    out[half + i] = in[half + i] * cos + in[i] * sin;
  }
  return out;
}

void RopeAndStoreKv(const Heads& heads, const std::vector<int32_t>& positions,
                    const std::vector<int64_t>& slots, const Doubles& cos_sin,
                    const Doubles& q_norm, const Doubles& k_norm, double eps, Doubles* qkv,
                    Cache* cache) {
  const int64_t d = heads.head_dim, width = (heads.q_heads + 2 * heads.kv_heads) * d;
  for (size_t t = 0; t < positions.size(); ++t) {
    const auto row = qkv->begin() + t * width;
    const Doubles angles(cos_sin.begin() + positions[t] * d,
                         cos_sin.begin() + (positions[t] + 1) * d);
    for (int64_t h = 0; h < heads.q_heads; ++h) {
      const Doubles q = RotateHead({row + h * d, row + (h + 1) * d}, q_norm, eps, angles);
      std::copy(q.begin(), q.end(), row + h * d);
    }
    if (slots[t] < 0) continue;
    const auto k_row = row + heads.q_heads * d, v_row = k_row + heads.kv_heads * d;
    for (int64_t h = 0; h < heads.kv_heads; ++h) {
      const int64_t slot = (slots[t] * heads.kv_heads + h) * d;
      const Doubles k = RotateHead({k_row + h * d, k_row + (h + 1) * d}, k_norm, eps, angles);
      std::copy(k.begin(), k.end(), cache->k.begin() + slot);
      std::copy(v_row + h * d, v_row + (h + 1) * d, cache->v.begin() + slot);
    }
  }
}

namespace {

// One query head at `position` over its sequence's pages.
Doubles AttendOne(const double* q, int64_t position, int64_t kv_head, const Heads& heads,
                  const Cache& cache, const std::vector<int32_t>& pages, double scale,
                  int64_t window) {
  const int64_t d = heads.head_dim;
  const auto at = [&](int64_t key) {
    const int64_t slot = pages[key / cache.page_size] * cache.page_size + key % cache.page_size;
    return (slot * heads.kv_heads + kv_head) * d;
  };
  const int64_t first = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  Doubles weights;
  for (int64_t key = first; key <= position; ++key) {
    double score = 0;
    for (int64_t i = 0; i < d; ++i) score += q[i] * cache.k[at(key) + i];
    weights.push_back(score * scale);
  }
  const double max = *std::max_element(weights.begin(), weights.end());
  double total = 0;
  for (double& weight : weights) total += weight = std::exp(weight - max);
  Doubles out(d, 0.0);
  for (int64_t key = first; key <= position; ++key) {
    for (int64_t i = 0; i < d; ++i) out[i] += weights[key - first] / total * cache.v[at(key) + i];
  }
  return out;
}

}  // namespace

Doubles PagedAttention(const Heads& heads, const Doubles& q, const Cache& cache,
                       const RaggedBatch& batch, double scale, int64_t window) {
  const int64_t group = heads.q_heads / heads.kv_heads, width = heads.q_heads * heads.head_dim;
  Doubles out;
  for (size_t s = 0; s < batch.kv_lens.size(); ++s) {
    for (int64_t t = batch.cu_q_lens[s]; t < batch.cu_q_lens[s + 1]; ++t) {
      const int64_t position = batch.kv_lens[s] - (batch.cu_q_lens[s + 1] - t);
      for (int64_t h = 0; h < heads.q_heads; ++h) {
        const Doubles head =
            AttendOne(q.data() + t * width + h * heads.head_dim, position, h / group, heads, cache,
                      batch.page_tables[s], scale, window);
        out.insert(out.end(), head.begin(), head.end());
      }
    }
  }
  return out;
}

}  // namespace trireme::reference
