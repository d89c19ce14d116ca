/* How a role ended: one typed event for the log, status.json and /metrics.
 *
 * What the kernel says of the process comes first, then what we did to it, then what it said of
 * itself: a role that is taken over can say anything. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "runtime/supervisor/supervisor_internal.h"

enum cm_role_end end_judge(const struct child *child, const siginfo_t *how, bool memory_kill)
{
    if (how->si_code != CLD_EXITED) {
        if (how->si_status == SIGSYS) {
            return CM_ROLE_END_POLICY;
        }
        if (how->si_status == SIGKILL && child->state == CHILD_KILLED) {
            return child->kill;
        }
        return how->si_status == SIGKILL && memory_kill ? CM_ROLE_END_MEMORY : CM_ROLE_END_SIGNAL;
    }
    if (child->stop_sent && how->si_status == 0) {
        return CM_ROLE_END_STOPPED;
    }
    if (child->ready_ms == 0) {
        return CM_ROLE_END_START;
    }
    return child->error_set || how->si_status != 0 ? CM_ROLE_END_FAILED : CM_ROLE_END_EXIT;
}

/* The error that goes with it, where nobody gave one. */
static void error_complete(struct child *child, const siginfo_t *how)
{
    const struct cm_role_end_row *row = &cm_role_ends[child->end];
    bool exited = how->si_code == CLD_EXITED;
    if (child->error_set) {
        return;
    }
    child->error_set = true;
    if (child->end == CM_ROLE_END_POLICY) {
        cm_error_set(&child->error, CM_E_SANDBOX, row->id,
                     "%s made a system call that its filter forbids: %s", child->name,
                     child->forbidden != NULL ? child->forbidden
                                              : "which one, this kernel's log does not say");
    } else if (child->end == CM_ROLE_END_MEMORY) {
        cm_error_set(&child->error, CM_E_SYSTEM, row->id,
                     "the kernel killed %s for want of memory: %s", child->name, row->next);
    } else if (exited) {
        cm_error_set(&child->error, CM_E_SYSTEM, row->id, "%s exited with %d and gave no reason",
                     child->name, how->si_status);
    } else {
        const char *name = sigabbrev_np(how->si_status);
        cm_error_set(&child->error, CM_E_SYSTEM, row->id, "%s was ended by signal %d (SIG%s)",
                     child->name, how->si_status, name != NULL ? name : "?");
    }
}

static void end_log(const struct service *service, const struct end_record *record)
{
    enum cm_log_level level = record->dumped                       ? CM_LOG_ERROR
                              : record->end == CM_ROLE_END_STOPPED ? CM_LOG_INFO
                                                                   : CM_LOG_WARN;
    CM_LOG(&service->log, level, "role_ended", CM_LOG_S("name", record->name),
           CM_LOG_S("end", cm_role_ends[record->end].word),
           CM_LOG_S("id", cm_role_ends[record->end].id), CM_LOG_I("pid", record->pid),
           CM_LOG_I("generation", record->generation),
           CM_LOG_S(record->by_signal ? "signal" : "how",
                    record->by_signal ? sigabbrev_np(record->code) : "exit"),
           CM_LOG_I("code", record->code), CM_LOG_I("core_dumped", record->dumped),
           CM_LOG_I("served", record->served), CM_LOG_I("life_ms", record->life_ms),
           CM_LOG_S("cause", record->cause), CM_LOG_S("text", record->text));
}

void end_take(struct service *service, struct child *child, const siginfo_t *how, bool memory_kill)
{
    /* in cm_state.ends: gateway, keeper, worker, devtpm */
    static const size_t places[CHILD_COUNT] = {
        [CHILD_GATEWAY] = 0, [CHILD_KEEPER] = 1, [CHILD_WORKER] = 2, [CHILD_DEVTPM] = 3};
    struct end_record *record = &service->ends[service->end_count++ % END_RECORDS];
    child->end = end_judge(child, how, memory_kill);
    bool asked = child->end == CM_ROLE_END_STOPPED;
    if (!asked) {
        error_complete(child, how);
    }
    *record = (struct end_record){
        .unix_s = time(NULL),
        .name = child->name,
        .end = child->end,
        .pid = child->pid,
        .generation = child->generation,
        .code = how->si_status,
        .by_signal = how->si_code != CLD_EXITED,
        .dumped = how->si_code == CLD_DUMPED,
        .served = child->ready_ms != 0,
        .life_ms = clock_ms() - child->started_ms,
    };
    if (!asked) {
        snprintf(record->cause, sizeof(record->cause), "%s", child->error.id);
        snprintf(record->text, sizeof(record->text), "%.199s", child->error.text);
    }
    service->state.ends[places[child - service->children]][child->end]++;
    service->state_dirty = true;
    end_log(service, record);
}
