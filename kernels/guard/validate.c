/* What a pattern cannot say: check digits and entropy, in integers. */
#include "kernels/guard/guard.h"

#include <string.h>

static bool digit(uint8_t byte)
{
    return byte >= '0' && byte <= '9';
}

/* ISO/IEC 7812-1 annex B: from the right, every second digit doubled, digits summed. */
static bool luhn(const uint8_t *bytes, uint32_t size)
{
    uint32_t sum = 0, count = 0;
    for (uint32_t i = size; i-- > 0;) {
        if (digit(bytes[i])) {
            uint32_t value = (uint32_t)(bytes[i] - '0') << (count++ & 1);
            sum += value > 9 ? value - 9 : value;
        }
    }
    return count > 1 && sum % 10 == 0;
}

/* Length of an IBAN by country, from the registry of ISO 13616. */
static const struct {
    char country[3];
    uint8_t length;
} iban_lengths[] = {
    {"AD", 24}, {"AE", 23}, {"AL", 28}, {"AT", 20}, {"AZ", 28}, {"BA", 20}, {"BE", 16}, {"BG", 22},
    {"BH", 22}, {"BI", 27}, {"BR", 29}, {"BY", 28}, {"CH", 21}, {"CR", 22}, {"CY", 28}, {"CZ", 24},
    {"DE", 22}, {"DJ", 27}, {"DK", 18}, {"DO", 28}, {"EE", 20}, {"EG", 29}, {"ES", 24}, {"FI", 18},
    {"FK", 18}, {"FO", 18}, {"FR", 27}, {"GB", 22}, {"GE", 22}, {"GI", 23}, {"GL", 18}, {"GR", 27},
    {"GT", 28}, {"HN", 28}, {"HR", 21}, {"HU", 28}, {"IE", 22}, {"IL", 23}, {"IQ", 23}, {"IS", 26},
    {"IT", 27}, {"JO", 30}, {"KW", 30}, {"KZ", 20}, {"LB", 28}, {"LC", 32}, {"LI", 21}, {"LT", 20},
    {"LU", 20}, {"LV", 21}, {"LY", 25}, {"MC", 27}, {"MD", 24}, {"ME", 22}, {"MK", 19}, {"MN", 20},
    {"MR", 27}, {"MT", 31}, {"MU", 30}, {"NI", 28}, {"NL", 18}, {"NO", 15}, {"OM", 23}, {"PK", 24},
    {"PL", 28}, {"PS", 29}, {"PT", 25}, {"QA", 29}, {"RO", 24}, {"RS", 22}, {"RU", 33}, {"SA", 24},
    {"SC", 31}, {"SD", 18}, {"SE", 24}, {"SI", 19}, {"SK", 24}, {"SM", 27}, {"SO", 23}, {"ST", 25},
    {"SV", 28}, {"TL", 23}, {"TN", 24}, {"TR", 26}, {"UA", 29}, {"VA", 22}, {"VG", 24}, {"XK", 20},
    {"YE", 30}};

static uint32_t iban_length(const uint8_t *country)
{
    for (size_t i = 0; i < sizeof(iban_lengths) / sizeof(iban_lengths[0]); i++) {
        if (memcmp(iban_lengths[i].country, country, 2) == 0) {
            return iban_lengths[i].length;
        }
    }
    return 0;
}

/* ISO 7064 mod 97-10 over the rest and then the first four, letters as 10 … 35. */
static bool iban(const uint8_t *bytes, uint32_t size)
{
    uint8_t plain[34];
    uint32_t count = 0, remainder = 0;
    for (uint32_t i = 0; i < size; i++) {
        uint8_t byte = bytes[i] >= 'a' && bytes[i] <= 'z' ? bytes[i] - 32 : bytes[i];
        if (digit(byte) || (byte >= 'A' && byte <= 'Z')) {
            if (count == sizeof(plain)) {
                return false;
            }
            plain[count++] = byte;
        }
    }
    if (count < 5 || count != iban_length(plain)) {
        return false;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint8_t byte = plain[(i + 4) % count];
        remainder = digit(byte) ? remainder * 10 + (uint32_t)(byte - '0')
                                : remainder * 100 + (uint32_t)(byte - 'A') + 10;
        remainder %= 97;
    }
    return remainder == 1;
}

/* log2 of 1 … 2^31 in steps of 2^-16: integer part, then a bit for each squaring (Knuth, The Art
 * of Computer Programming, vol. 1, section 1.2.2, exercise 25 solves the like). */
static uint32_t log2_fixed(uint32_t value)
{
    uint32_t whole = 31u - (uint32_t)__builtin_clz(value);
    uint64_t x = (uint64_t)value << (31u - whole); /* in [2^31, 2^32) */
    uint32_t log = whole << 16;
    for (uint32_t bit = 1u << 15; bit != 0; bit >>= 1) {
        x = x * x >> 31;
        if (x >= 1ull << 32) {
            x >>= 1;
            log |= bit;
        }
    }
    return log;
}

/* Shannon entropy of the bytes' frequencies: n log n - sum c log c >= n * floor. */
static bool entropy(const uint8_t *bytes, uint32_t size, uint32_t floor_hundredths)
{
    uint16_t counts[256] = {0};
    if (size == 0) {
        return false;
    }
    uint64_t total = (uint64_t)size * log2_fixed(size);
    for (uint32_t i = 0; i < size; i++) {
        counts[bytes[i]]++;
    }
    for (uint32_t i = 0; i < 256; i++) {
        total -= counts[i] > 1 ? (uint64_t)counts[i] * log2_fixed(counts[i]) : 0;
    }
    return total * 100 >= ((uint64_t)size * floor_hundredths << 16);
}

bool cm_guard_valid(enum cm_guard_validator validator, uint32_t argument, const uint8_t *bytes,
                    uint32_t size)
{
    switch (validator) {
    case CM_GUARD_VALID_ALWAYS:
        return true;
    case CM_GUARD_VALID_LUHN:
        return luhn(bytes, size);
    case CM_GUARD_VALID_IBAN:
        return iban(bytes, size);
    case CM_GUARD_VALID_ENTROPY:
        return entropy(bytes, size, argument);
    }
    return true; /* unknown: forbidden rather than released */
}
