/* The table of requests that workers died over. */
#include "runtime/gateway/quarantine.h"

#include <errno.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <string.h>
#include <sys/random.h>

enum cm_status cm_quarantine_init(struct cm_quarantine *quarantine, struct cm_error *err)
{
    memset(quarantine, 0, sizeof(*quarantine));
    if (getrandom(quarantine->key, sizeof(quarantine->key), 0) !=
        (ssize_t)sizeof(quarantine->key)) {
        return cm_error_errno(err, errno, "CM-GW-RANDOM", "no random bytes");
    }
    return CM_OK;
}

void cm_quarantine_digest(const struct cm_quarantine *quarantine, const void *prompt, size_t bytes,
                          uint8_t ret_digest[static CM_QUARANTINE_DIGEST_BYTES])
{
    uint8_t whole[EVP_MAX_MD_SIZE];
    unsigned size = 0;
    const uint8_t *made = HMAC(EVP_sha256(), quarantine->key, (int)sizeof(quarantine->key), prompt,
                               bytes, whole, &size);
    CM_ASSERT(made != NULL && size >= CM_QUARANTINE_DIGEST_BYTES);
    memcpy(ret_digest, whole, CM_QUARANTINE_DIGEST_BYTES);
}

static enum cm_suspicion suspicion_of(const struct cm_quarantine_row *row, uint64_t now_ms)
{
    if (row->deaths == 0 || now_ms >= row->until_ms) {
        return CM_SUSPICION_NONE;
    }
    return row->deaths >= CM_QUARANTINE_DEATHS ? CM_SUSPICION_REFUSED : CM_SUSPICION_SUSPECT;
}

static size_t row_find(const struct cm_quarantine *quarantine, const uint8_t *digest)
{
    size_t at = 0;
    while (at < CM_QUARANTINE_ROWS &&
           (quarantine->rows[at].deaths == 0 ||
            memcmp(quarantine->rows[at].digest, digest, CM_QUARANTINE_DIGEST_BYTES) != 0)) {
        at++;
    }
    return at;
}

/* A free row, else one that is over, else the suspect, else the refused one that ends first. */
static struct cm_quarantine_row *row_take(struct cm_quarantine *quarantine, uint64_t now_ms)
{
    struct cm_quarantine_row *best = &quarantine->rows[0];
    for (size_t i = 1; i < CM_QUARANTINE_ROWS; i++) {
        struct cm_quarantine_row *row = &quarantine->rows[i];
        enum cm_suspicion is = suspicion_of(row, now_ms);
        enum cm_suspicion best_is = suspicion_of(best, now_ms);
        if (is < best_is || (is == best_is && row->until_ms < best->until_ms)) {
            best = row;
        }
    }
    return best;
}

enum cm_suspicion cm_quarantine_look(const struct cm_quarantine *quarantine,
                                     const uint8_t digest[static CM_QUARANTINE_DIGEST_BYTES],
                                     uint64_t now_ms, uint64_t *ret_left_ms)
{
    size_t at = row_find(quarantine, digest);
    enum cm_suspicion is =
        at < CM_QUARANTINE_ROWS ? suspicion_of(&quarantine->rows[at], now_ms) : CM_SUSPICION_NONE;
    if (is != CM_SUSPICION_NONE) {
        *ret_left_ms = quarantine->rows[at].until_ms - now_ms;
    }
    return is;
}

enum cm_suspicion cm_quarantine_died(struct cm_quarantine *quarantine,
                                     const uint8_t digest[static CM_QUARANTINE_DIGEST_BYTES],
                                     uint64_t now_ms)
{
    size_t at = row_find(quarantine, digest);
    struct cm_quarantine_row *row =
        at < CM_QUARANTINE_ROWS ? &quarantine->rows[at] : row_take(quarantine, now_ms);
    bool known = at < CM_QUARANTINE_ROWS && suspicion_of(row, now_ms) != CM_SUSPICION_NONE;
    if (known && row->died_ms == now_ms) {
        return suspicion_of(row, now_ms);
    }
    memcpy(row->digest, digest, CM_QUARANTINE_DIGEST_BYTES);
    row->died_ms = now_ms;
    row->deaths = known ? row->deaths + 1 : 1;
    row->until_ms = now_ms + (row->deaths >= CM_QUARANTINE_DEATHS ? CM_QUARANTINE_REFUSE_MS
                                                                  : CM_QUARANTINE_SUSPECT_MS);
    return suspicion_of(row, now_ms);
}

void cm_quarantine_lived(struct cm_quarantine *quarantine,
                         const uint8_t digest[static CM_QUARANTINE_DIGEST_BYTES])
{
    size_t at = row_find(quarantine, digest);
    if (at < CM_QUARANTINE_ROWS) {
        quarantine->rows[at] = (struct cm_quarantine_row){.deaths = 0};
    }
}

uint32_t cm_quarantine_count(const struct cm_quarantine *quarantine, enum cm_suspicion suspicion,
                             uint64_t now_ms)
{
    uint32_t count = 0;
    for (size_t i = 0; i < CM_QUARANTINE_ROWS; i++) {
        count += suspicion_of(&quarantine->rows[i], now_ms) == suspicion;
    }
    return count;
}
