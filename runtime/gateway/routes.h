/* The one table of what this server answers. What is not in it is refused: a path with 404, a
 * method with 405. No handler can be reached but through a row, and each row names what a caller
 * must show. */
#ifndef CASEMATE_RUNTIME_GATEWAY_ROUTES_H
#define CASEMATE_RUNTIME_GATEWAY_ROUTES_H

#include "runtime/gateway/http.h"

enum cm_permission {
    CM_PERMISSION_OPEN,   /* probes: no credential is looked at */
    CM_PERMISSION_KEY,    /* a valid API key */
    CM_PERMISSION_METRICS /* a valid API key, unless metrics are configured to be open */
};

enum cm_handler {
    CM_HANDLER_CHAT,
    CM_HANDLER_COMPLETIONS,
    CM_HANDLER_MODELS,
    CM_HANDLER_MODEL,
    CM_HANDLER_LIVEZ,
    CM_HANDLER_READYZ,
    CM_HANDLER_STARTUPZ,
    CM_HANDLER_HEALTH,
    CM_HANDLER_VERSION,
    CM_HANDLER_METRICS,
    CM_HANDLER_ATTESTATION,
    CM_HANDLER_COUNT
};

struct cm_route {
    const char *method;
    const char *path; /* ends with '/': the rest of the path is a parameter without '/' */
    enum cm_permission permission;
    enum cm_handler handler;
    bool body;   /* takes a JSON body up to body_bytes_max; else none at all */
    bool logged; /* probes stay out of the access log */
    const char *purpose;
};

#define CM_ROUTE_COUNT CM_HANDLER_COUNT
extern const struct cm_route cm_routes[CM_ROUTE_COUNT];

/* 200 and *ret_route (and *ret_parameter, borrowed); else 404, or 405 with *ret_allow (static). */
int cm_route_find(struct cm_span method, struct cm_span path, const struct cm_route **ret_route,
                  struct cm_span *ret_parameter, const char **ret_allow);

#endif
