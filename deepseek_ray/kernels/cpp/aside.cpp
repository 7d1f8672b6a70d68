// down(silu(gate x) * up x) in the time that the cores have left: while experts of other processes are computed on them.
//
// A thread of the lowest priority takes the columns piece by piece, in order. Who wants the result does the rest with the
// pool and waits for nobody: should the thread be in the middle of a piece, that piece is computed twice, to the same bits
// in the same place.

#include <cstring>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#endif

#include "lanes.h"
#include "operators.h"
#include "pool.h"

namespace {

constexpr int64_t kPiece = 8;  // blocks of columns: some tens of microseconds

int64_t pieces_of(const PackedMatrix& matrix) { return (matrix.num_out + kPiece * kLanes - 1) / (kPiece * kLanes); }

class Mlp {
public:
    Mlp(const void* x, int64_t stride, int32_t dtype, int64_t rows, const PackedMatrix& gate_up, const PackedMatrix& down)
        : gate_up_(gate_up), down_(down), rows_(rows), dtype_(dtype), x_(room(gate_up.num_in)),
          both_(room(gate_up.num_out)), gated_(room(down.num_in)), out_(room(down.num_out)) {
        const size_t bytes = x_.size() / size_t(rows);
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(x_.data() + size_t(row) * bytes, at(x, row * stride, dtype), bytes);
    }

    // Piece after piece, until somebody wants the result.
    void run_aside() {
        const int64_t first = pieces_of(gate_up_), all = first + 1 + pieces_of(down_);
        for (int64_t piece = 0; piece < all && !wanted_.load(std::memory_order_acquire); ++piece) {
            if (piece < first) up(piece, piece + 1, 1);
            else if (piece == first) gate(1);
            else down(piece - first - 1, piece - first, 1);
            done_.store(piece + 1, std::memory_order_release);
        }
        leave();
    }

    void leave() { left_.store(true, std::memory_order_release); }

    void finish(void* out, int32_t threads) {
        wanted_.store(true, std::memory_order_release);
        const int64_t first = pieces_of(gate_up_), done = done_.load(std::memory_order_acquire);
        if (done < first) up(done, first, threads);
        if (done <= first) gate(threads);
        down(std::max<int64_t>(0, done - first - 1), pieces_of(down_), threads);
        std::memcpy(out, out_.data(), out_.size());
    }

    bool is_left() const { return left_.load(std::memory_order_acquire); }

private:
    std::vector<char> room(int64_t columns) const {
        return std::vector<char>(size_t(rows_ * columns) * (dtype_ == kFloat32 ? 4 : 2));
    }

    void up(int64_t begin, int64_t end, int32_t threads) { columns(gate_up_, x_, both_, begin, end, threads); }
    void gate(int32_t threads) { dr_silu_mul(both_.data(), gated_.data(), dtype_, rows_, down_.num_in, threads); }
    void down(int64_t begin, int64_t end, int32_t threads) { columns(down_, gated_, out_, begin, end, threads); }

    // The pieces [begin, end) of a product.
    void columns(const PackedMatrix& matrix, const std::vector<char>& from, std::vector<char>& to, int64_t begin,
                 int64_t end, int32_t threads) {
        const int64_t block = begin * kPiece, column = block * kLanes;
        if (column >= matrix.num_out || begin >= end) return;
        const void* x = from.data();
        const void* weights = matrix.data + block * matrix.data_bytes;
        const void* scales = matrix.scales ? matrix.scales + block * matrix.scale_bytes : nullptr;
        void* out = at(to.data(), column, dtype_);
        dr_grouped_linear(1, &rows_, &x, matrix.num_in, dtype_, &weights, matrix.dtype, scales ? &scales : nullptr, &out,
                          matrix.num_out, dtype_, std::min(end * kPiece * kLanes, matrix.num_out) - column, matrix.num_in,
                          threads);
    }

    const PackedMatrix gate_up_, down_;
    const int64_t rows_;
    const int32_t dtype_;
    std::vector<char> x_, both_, gated_, out_;
    std::atomic<int64_t> done_{0};
    std::atomic<bool> wanted_{false}, left_{false};
};

// The thread. It shares no lock with those who give it work, and frees nothing of theirs: whoever waited for it to get some
// time again would wait for long. Never destroyed: it runs until the process ends.
class Idler {
public:
    static Idler& shared() {
        static Idler* const it = new Idler;
        return *it;
    }

    // What was added before and not begun is left.
    void add(Mlp* work) {
        if (Mlp* before = next_.exchange(work, std::memory_order_acq_rel)) before->leave();
        next_.notify_one();
    }

private:
    Idler() { std::thread([this] { run(); }).detach(); }

    void run() {
#if defined(SCHED_IDLE)
        const sched_param none{};
        sched_setscheduler(0, SCHED_IDLE, &none);
#endif
        for (;;) {
            next_.wait(nullptr, std::memory_order_acquire);
            if (Mlp* work = next_.exchange(nullptr, std::memory_order_acq_rel)) work->run_aside();
        }
    }

    std::atomic<Mlp*> next_{nullptr};
};

}  // namespace

extern "C" {

// Begin with x [rows, gate_up.num_in]. The result, and the weights, must stay until `dr_aside_is_left`.
Mlp* dr_aside_begin(const void* x, int64_t stride, int32_t dtype, int64_t rows, const PackedMatrix* gate_up,
                    const PackedMatrix* down) {
    Mlp* work = new Mlp(x, stride, dtype, rows, *gate_up, *down);
    Idler::shared().add(work);
    return work;
}

// out [rows, down.num_out], in x's dtype.
void dr_aside_finish(Mlp* work, void* out, int32_t threads) { work->finish(out, threads); }

// Whether the thread is done with it.
int32_t dr_aside_is_left(const Mlp* work) { return work->is_left(); }

void dr_aside_free(Mlp* work) { delete work; }

}  // extern "C"
