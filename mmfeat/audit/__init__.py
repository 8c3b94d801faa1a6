"""Audits: duplicates, conflicting labels, leaks, odd files and likely label errors of a data set.

`mmfeat.audit.run.audit_data` makes one; `mmfeat.audit.result.read_audit` reads it again.
"""
