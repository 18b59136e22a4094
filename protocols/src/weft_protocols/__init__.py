"""Pure definitions of the mesh: subjects, binding, records, resources, errors. No I/O, no clock."""
