#include "runtime/delivery.h"

#include <exception>
#include <iterator>
#include <utility>

#include "kernels/trace.h"

namespace trireme {

Delivery::Delivery(Hooks hooks) : hooks_(std::move(hooks)), thread_([this] { Run(); }) {}

Delivery::~Delivery() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  thread_.join();
}

void Delivery::Push(std::vector<Item>* items) {
  if (items->empty()) return;
  {
    const std::lock_guard lock(mutex_);
    queue_.insert(queue_.end(), std::make_move_iterator(items->begin()),
                  std::make_move_iterator(items->end()));
  }
  items->clear();
  work_.notify_one();
}

void Delivery::Run() {
  std::vector<Item> items;
  while (true) {
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      items.swap(queue_);
    }
    const TraceScope trace("deliver");
    for (Item& item : items) Deliver(item);
    items.clear();
  }
}

// The boundary to foreign code: an exception ends here.
void Delivery::Deliver(Item& item) {
  Recipient& recipient = *item.recipient;
  const uint64_t id = item.output.request_id;
  if (!recipient.failed) {
    std::string what;
    try {
      recipient.callback(item.output);
    } catch (const std::exception& error) {
      recipient.failed = true;
      what = error.what();
    } catch (...) {
      recipient.failed = true;
      what = "something that is no std::exception";
    }
    if (recipient.failed) hooks_.threw(id, what);
  }
  item.recipient.reset();  // whatever the callback holds is gone before the request counts as over
  if (item.last) hooks_.over(id);
}

}  // namespace trireme
