// The configuration of AMX's tiles: 0 to 3 for sums, from 4 on for inputs, and the last ones for weights. The process must have asked the kernel for them
// (amx.py).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int TILE_ROWS = 16;

// GCC does not know that the instructions for tiles read memory: what was stored before must be there.
inline void stores_are_done() { __asm__ volatile("" ::: "memory"); }

// Tiles are configured for the calling thread as long as this lives. Released tiles need not be saved when the thread is switched out.
class Tiles {
   public:
    // input_bytes: of a row of inputs in a tile. weight_rows: of 4 bytes for each of 16 columns. rows: of inputs and sums.
    // first_weights: the first tile for weights.
    Tiles(uint16_t input_bytes, uint8_t weight_rows, uint8_t rows = TILE_ROWS, int first_weights = 6) {
        alignas(64) struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config = {};
        config.palette = 1;
        for (int i = 0; i < 8; i++) {
            config.row_bytes[i] = i >= 4 && i < first_weights ? input_bytes : 64;
            config.rows[i] = i >= first_weights ? weight_rows : rows;
        }
        static_assert(sizeof config == 64, "the processor reads 64 bytes");
        stores_are_done();
        _tile_loadconfig(&config);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }
};

}  // namespace
