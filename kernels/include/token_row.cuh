// What the scheduler tells the kernels after it about rows of scores.
#pragma once
#include "common.cuh"

constexpr int kRowAlignment = 4;  // elements: selection reads a row in vectors of 16 bytes

// What a token sees, and where its row of scores begins.
struct alignas(16) TokenRow {
    int sequence;  // -1: the token belongs to none, and sees no key
    int kv_len;
    int64 offset;  // elements from the beginning of the launch's scores
};

// The rows of a launch.
struct Window {
    int first_token, end_token;
    int selection_blocks;  // blocks that select from these rows, at most
};
