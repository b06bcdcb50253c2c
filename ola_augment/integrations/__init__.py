"""OLALearner inside other frameworks' loops; each module needs its framework (an extra)."""
