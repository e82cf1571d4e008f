// Memory that a thread keeps between calls of a kernel, in whole cache lines: a vector or a row of a tile that crosses two takes twice as long.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

namespace {

template <class T>
class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(memory, LINE); }

    // Room for `num` values. What was there is lost if there was less; new memory holds zeros.
    T* reserve(int64_t num) {
        if (num > size) {
            ::operator delete(memory, LINE);
            memory = nullptr, size = 0;
            memory = (T*)::operator new(num * sizeof(T), LINE);
            size = num;
            memset((void*)memory, 0, num * sizeof(T));
        }
        return memory;
    }

   private:
    static constexpr std::align_val_t LINE{64};
    T* memory = nullptr;
    int64_t size = 0;
};

}  // namespace
