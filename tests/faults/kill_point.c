/* Kill points of the fault tests' build. The supervisor is told by its environment:
 *
 *     CASEMATE_KILL_POINT=worker:17    the first worker ends at its 17th point
 *     CASEMATE_KILL_POINT=count        each role logs its points as it passes them
 *
 * A role of the first generation gets the bare number. Ending is a trap: as sudden as SIGKILL, and
 * no filter of system calls has a say in it. */
#include "runtime/base/kill_point.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "runtime/base/frame.h"

#define VARIABLE "CASEMATE_KILL_POINT"

enum mode { MODE_UNKNOWN, MODE_OFF, MODE_COUNT, MODE_KILL };

static struct {
    enum mode mode;
    unsigned long at, passed;
    const char *after_what, *after_name;
} state;

static void mode_read(void)
{
    const char *text = getenv(VARIABLE);
    const char *own = "supervisor:";
    state.mode = MODE_OFF;
    if (text != NULL && strncmp(text, own, strlen(own)) == 0) {
        text += strlen(own);
    } else if (text == NULL || strchr(text, ':') != NULL) {
        return;
    }
    state.at = strtoul(text, NULL, 10);
    state.mode = strcmp(text, "count") == 0 ? MODE_COUNT : MODE_KILL;
}

/* The supervisor has no log pipe; its points are counted on stderr. */
static void point_log(const char *when, const char *what, const char *name)
{
    char line[200];
    int size = snprintf(
        line, sizeof(line),
        "{\"event\":\"kill_point\",\"process\":\"%s\",\"at\":%lu,\"where\":\"%s %s %s\"}\n",
        program_invocation_short_name, state.passed, when, what, name);
    ssize_t written = write(STDERR_FILENO, line, (size_t)size);
    (void)written;
}

static void pass(const char *when, const char *what, const char *name)
{
    if (state.mode == MODE_UNKNOWN) {
        mode_read();
    }
    if (state.mode == MODE_OFF) {
        return;
    }
    state.passed++;
    if (state.mode == MODE_COUNT) {
        point_log(when, what, name);
    } else if (state.passed == state.at) {
        point_log(when, what, name);
        __builtin_trap();
    }
}

void cm_kill_point_now(void)
{
    if (state.after_what != NULL) {
        const char *what = state.after_what;
        state.after_what = NULL;
        pass("after", what, state.after_name);
    }
}

void cm_kill_point(const char *when, const char *what, const char *name)
{
    cm_kill_point_now();
    pass(when, what, name);
}

void cm_kill_point_after(const char *what, const char *name)
{
    state.after_what = what;
    state.after_name = name;
}

/* How often each role was started: shared, since the exec is made in a child of the supervisor. */
static unsigned *starts;

__attribute__((constructor)) static void starts_share(void)
{
    void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    starts = at != MAP_FAILED ? at : NULL;
}

char *const *cm_kill_point_environment(const char *program, char *const *environment)
{
    static const char *const roles[] = {"gateway", "worker", "keeper", "devtpm"};
    static char entry[64];
    static char *given[] = {entry, NULL};
    const char *text = getenv(VARIABLE);
    for (size_t i = 0; i < 4 && text != NULL && starts != NULL; i++) {
        size_t size = strlen(roles[i]);
        if (strcmp(program + strlen("casemate-"), roles[i]) != 0) {
            continue;
        }
        bool mine = strncmp(text, roles[i], size) == 0 && text[size] == ':';
        bool count = strcmp(text, "count") == 0;
        if (__atomic_fetch_add(&starts[i], 1, __ATOMIC_SEQ_CST) == 0 && (mine || count)) {
            snprintf(entry, sizeof(entry), VARIABLE "=%s", mine ? text + size + 1 : text);
            return given;
        }
    }
    return environment;
}
