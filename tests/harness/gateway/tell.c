/* What the harness tells the test, and how it ends when it cannot go on. */
#include "tests/harness/gateway/harness.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void die(const char *what)
{
    fprintf(stderr, "gateway_harness: %s: %s\n", what, strerror(errno));
    exit(1);
}

void check(bool condition, const char *what)
{
    if (!condition) {
        die(what);
    }
}

uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

uint64_t now_ms(void)
{
    return now_us() / 1000u;
}

void event_begin(const char *name)
{
    printf("{\"t\":%.6f,\"event\":\"%s\"", (double)now_us() / 1e6, name);
}

void event_end(void)
{
    printf("}\n");
    fflush(stdout);
}

void event(const char *name, const char *format, ...)
{
    va_list args;
    event_begin(name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    event_end();
}

bool begins(const char *text, const char *word, const char **ret_rest)
{
    size_t size = strlen(word);
    if (strncmp(text, word, size) != 0 || (text[size] != ' ' && text[size] != '\0')) {
        return false;
    }
    *ret_rest = text[size] == ' ' ? text + size + 1 : text + size;
    return true;
}
