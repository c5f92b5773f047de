"""Grafana and Prometheus as code: dashboards, rules, and the stack that serves them.

    overview curvature attention representation agent     one dashboard each, built with Grafana's Foundation SDK
    promql  panels  board                                 what these share: queries, panels, the frame
    limits                                                where healthy ends, as the views of `queries` have it
    generate                                              writes the dashboards into `stack/`, where they are committed
    stack                                                 writes `stack/` for a user: `lmt stack DIR`

Only `generate` and what it imports need the SDK; who installs the package has the JSON. Rules, provisioning and the
compose file are written by hand, in `stack/`.
"""
