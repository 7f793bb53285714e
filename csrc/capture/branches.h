// Branches of a captured graph: matrix products that do not need one another run side by side.
#pragma once

#include "driver/driver.h"
#include "tensors/extent.h"

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/Event.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

namespace graphcache {

// A new stream, for as long as the process runs: torch gives those of its pool to several users.
driver::Stream new_stream();

// While it is open, products that this thread captures on `main` are captured in parallel, on `sides`: if none
// reads or writes memory that another writes, and nothing comes between them but operators that only make new
// tensors of their arguments. Whatever follows waits for all of them. A product of few rows leaves most of the
// device idle: three of them in parallel take little longer than one.
class Branches {
 public:
  Branches(driver::Stream handle, c10::Stream main, std::vector<c10::Stream> sides);
  ~Branches();
  Branches(const Branches&) = delete;
  Branches& operator=(const Branches&) = delete;

  void open();
  // Returns what went wrong while it was open.
  std::exception_ptr close();

  // Products that run in parallel to an earlier one.
  size_t count() const { return count_; }
  // Operators that stayed in their place for their size alone.
  size_t large() const { return large_; }

 private:
  struct Part; // of a run: an operator

  // Products with nothing unknown in between. The tensors that they read and wrote are held until something else
  // is captured, so that nobody else is given the memory meanwhile.
  struct Run {
    c10::Event fork;
    bool on_main; // whether any part is
    size_t sides = 0; // how often one was taken
    std::vector<Extent> read;
    std::vector<Extent> mutated;
    std::vector<c10::Storage> held;
  };

  static std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& function);
  static void on_end(const at::RecordFunction& function, at::ObserverContext* context);
  std::unique_ptr<Part> start(const at::RecordFunction& function);
  std::unique_ptr<Part> start_product(std::vector<at::Tensor> read, bool has_out);
  std::unique_ptr<Part> start_between(const std::vector<at::Tensor>& read);
  void end(const at::RecordFunction& function, const Part& part);
  bool is_going_on() const; // the run
  bool may_join(const std::vector<at::Tensor>& read, const std::optional<at::Tensor>& out) const;
  bool is_plain(const at::Tensor& tensor) const;
  std::vector<driver::GraphNode> tips() const;
  static bool overlap(const std::vector<Extent>& extents, const at::Tensor& tensor);
  void add(const at::Tensor& tensor, std::vector<Extent>& extents); // to the run

  const driver::Stream handle_; // of the main stream
  const c10::Stream main_;
  const std::vector<c10::Stream> sides_;
  std::optional<at::CallbackHandle> callback_;
  std::optional<Run> run_;
  std::vector<driver::GraphNode> tips_; // what the main stream waited for when the run was last added to
  bool inside_ = false; // an operator, which may consist of others
  std::exception_ptr error_;
  size_t count_ = 0;
  size_t large_ = 0;
};

} // namespace graphcache
