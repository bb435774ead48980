#include "parallel/timed_communicator.h"

#include <chrono>
#include <utility>

#include "kernels/trace.h"

namespace trireme {
namespace {

class TimedCommunicator : public Communicator {
 public:
  TimedCommunicator(std::unique_ptr<Communicator> inner, double* seconds)
      : inner_(std::move(inner)), seconds_(seconds) {
    rank_ = inner_->rank();
    size_ = inner_->size();
    RecordWith(nullptr, inner_->group());  // the inner one records its calls itself
  }
  absl::Status Reserve(int64_t max_bytes) override { return inner_->Reserve(max_bytes); }
  void ChooseSums(int64_t max_bytes) override { inner_->ChooseSums(max_bytes); }
  int64_t buffer_bytes() const override { return inner_->buffer_bytes(); }
  bool spans_hosts() const override { return inner_->spans_hosts(); }
  bool capturable() const override { return inner_->capturable(); }
  std::string DescribeSums() const override { return inner_->DescribeSums(); }
  bool FusesNorm(ConstTensorView data) const override { return inner_->FusesNorm(data); }
  void DoAllReduceSum(Stream& stream, TensorView data) override {
    Time("all-reduce", [&] { inner_->AllReduceSum(stream, data); });
  }
  void DoAllReduceAddNorm(Stream& stream, TensorView data, TensorView residual,
                          const NormParams& norm, TensorView out) override {
    Time("all-reduce and norm",
         [&] { inner_->AllReduceAddNorm(stream, data, residual, norm, out); });
  }
  void DoAllGather(Stream& stream, ConstTensorView in, TensorView out) override {
    Time("all-gather", [&] { inner_->AllGather(stream, in, out); });
  }
  int64_t DoSend(Stream& stream, ConstTensorView data, int peer) override {
    int64_t ticket = 0;
    Time("send", [&] { ticket = inner_->Send(stream, data, peer); });
    return ticket;
  }
  void DoWaitSend(Stream& stream, int64_t ticket) override {
    Time("wait for send", [&] { inner_->WaitSend(stream, ticket); });
  }
  void DoRecv(Stream& stream, TensorView data, int peer) override {
    Time("receive", [&] { inner_->Recv(stream, data, peer); });
  }
  absl::Status Poll() override { return inner_->Poll(); }
  void Abort() override { inner_->Abort(); }

 private:
  template <typename Call>
  void Time(const char* name, const Call& call) {
    const TraceScope trace(name);
    const auto begin = std::chrono::steady_clock::now();
    call();
    *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    bytes_moved_ = inner_->bytes_moved();
  }

  std::unique_ptr<Communicator> inner_;
  double* seconds_;
};

}  // namespace

std::unique_ptr<Communicator> NewTimedCommunicator(std::unique_ptr<Communicator> inner,
                                                   double* seconds) {
  if (inner->size() == 1) return inner;
  return std::make_unique<TimedCommunicator>(std::move(inner), seconds);
}

}  // namespace trireme
