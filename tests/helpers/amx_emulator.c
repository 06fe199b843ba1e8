/* Intel AMX's tile registers in memory, as the instructions that the kernels use change them. */
#include <stdint.h>
#include <string.h>

static _Thread_local uint8_t tile[8][16][64];
static _Thread_local uint8_t rows[8];
static _Thread_local uint16_t width[8];
static _Thread_local int configured;

int32_t emulated_ldtilecfg(const uint8_t *settings) {
  configured = settings[0] == 1;
  memcpy(width, settings + 16, sizeof width);
  memcpy(rows, settings + 48, sizeof rows);
  for (int t = 0; t < 8; t++) {
    if (rows[t] > 16 || width[t] > 64) configured = 0;
  }
  memset(tile, 0, sizeof tile);
  return 0;
}

/* what has not been set up computes nothing, as a fault would be hard to read in a test */
int32_t emulated_tilezero(int8_t t) {
  memset(tile[t], 0, sizeof tile[t]);
  return 0;
}

int32_t emulated_tileloadd64(int8_t t, const uint8_t *from, int64_t stride) {
  memset(tile[t], 0, sizeof tile[t]);
  for (int row = 0; configured && row < rows[t]; row++) {
    memcpy(tile[t][row], from + row * stride, width[t]);
  }
  return 0;
}

int32_t emulated_tilestored64(int8_t t, uint8_t *to, int64_t stride) {
  for (int row = 0; configured && row < rows[t]; row++) {
    memcpy(to + row * stride, tile[t][row], width[t]);
  }
  return 0;
}

int32_t emulated_tdpbusd(int8_t c, int8_t a, int8_t b) {
  for (int m = 0; configured && m < rows[c]; m++) {
    for (int n = 0; n < width[c] / 4; n++) {
      int32_t sum;
      memcpy(&sum, &tile[c][m][4 * n], 4);
      for (int k = 0; k < width[a] / 4; k++) {
        for (int j = 0; j < 4; j++) {
          sum += tile[a][m][4 * k + j] * (int8_t)tile[b][k][4 * n + j];
        }
      }
      memcpy(&tile[c][m][4 * n], &sum, 4);
    }
  }
  return 0;
}

int32_t emulated_tilerelease(void) {
  configured = 0;
  return 0;
}
