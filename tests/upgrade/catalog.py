"""What a schema consists of, to compare an upgraded database with a fresh one.

In words that do not depend on object ids or on the order in which things were made: a column that came later stands
behind the others, and nothing relies on where. What a migration has set aside in a schema of its own (CONTRIBUTING.md) is
not looked at.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import TupleRow

Catalog = dict[tuple[str, str], Any]
"""(sort of thing, its name) → everything that it is."""

HERE = "= 'stepwell'::regnamespace"

QUERIES = {
    "schema": f"""
        select nspname, nspacl::text, pg_get_userbyid(nspowner), obj_description(oid, 'pg_namespace')
        from pg_namespace where oid {HERE}""",
    "relation": f"""
        select c.relname, c.relkind::text, c.relpersistence::text, array(select unnest(c.reloptions) order by 1), c.relacl::text, c.relrowsecurity,
               c.relforcerowsecurity, c.relreplident::text, am.amname, c.reltablespace, pg_get_userbyid(c.relowner),
               array(select unnest(t.reloptions) order by 1), obj_description(c.oid, 'pg_class')
        from pg_class c left join pg_am am on am.oid = c.relam left join pg_class t on t.oid = c.reltoastrelid
        where c.relnamespace {HERE}""",
    "column": f"""
        select c.relname || '.' || a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text,
               a.attgenerated::text, a.attstorage::text, a.attcompression::text, a.attstattarget,
               array(select unnest(a.attoptions) order by 1),
               a.attacl::text, pg_get_expr(d.adbin, d.adrelid), a.attcollation::regcollation::text,
               col_description(c.oid, a.attnum)
        from pg_class c
        join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
        where c.relnamespace {HERE} and c.relkind <> 'i'""",
    "constraint": f"""
        select c.conrelid::regclass || ' ' || c.conname, pg_get_constraintdef(c.oid), c.convalidated, c.condeferrable,
               c.condeferred, c.connoinherit, obj_description(c.oid, 'pg_constraint')
        from pg_constraint c where c.connamespace {HERE}""",
    "index": f"""
        select i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid), i.indisunique, i.indisprimary, i.indisvalid,
               i.indisready, i.indisclustered, i.indisreplident, i.indimmediate
        from pg_index i join pg_class c on c.oid = i.indrelid where c.relnamespace {HERE}""",
    "function": f"""
        select p.oid::regprocedure::text, pg_get_functiondef(p.oid), p.proacl::text, pg_get_userbyid(p.proowner),
               obj_description(p.oid, 'pg_proc')
        from pg_proc p
        where p.pronamespace {HERE} and p.prokind in ('f', 'p')""",
    "view": f"""
        select c.relname, pg_get_viewdef(c.oid) from pg_class c where c.relnamespace {HERE} and c.relkind in ('v', 'm')""",
    "trigger": f"""
        select t.tgrelid::regclass || ' ' || t.tgname, pg_get_triggerdef(t.oid), t.tgenabled::text
        from pg_trigger t join pg_class c on c.oid = t.tgrelid where c.relnamespace {HERE} and not t.tgisinternal""",
    "rule": """
        select r.tablename || ' ' || r.rulename, r.definition from pg_rules r where r.schemaname = 'stepwell'""",
    "policy": f"""
        select p.polrelid::regclass || ' ' || p.polname, p.polcmd::text, p.polpermissive, p.polroles::regrole[]::text,
               pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)
        from pg_policy p join pg_class c on c.oid = p.polrelid where c.relnamespace {HERE}""",
    "sequence": f"""
        select s.seqrelid::regclass::text, s.seqtypid::regtype::text, s.seqstart, s.seqincrement, s.seqmin, s.seqmax,
               s.seqcache, s.seqcycle,
               (select d.refobjid::regclass || '.' || a.attname from pg_depend d
                join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
                where d.classid = 'pg_class'::regclass and d.objid = s.seqrelid and d.deptype in ('a', 'i'))
        from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.relnamespace {HERE}""",
    "type": f"""
        select t.typname, t.typtype::text, t.typacl::text, t.typnotnull, t.typdefault, format_type(t.typbasetype, t.typtypmod),
               array(select e.enumlabel::text from pg_enum e where e.enumtypid = t.oid order by e.enumsortorder),
               -- Of a type that is no table's the order counts: values are written by it.
               array(select a.attname || ' ' || format_type(a.atttypid, a.atttypmod) from pg_attribute a
                     where a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped and c.relkind = 'c'
                     order by a.attnum)
        from pg_type t left join pg_class c on c.oid = t.typrelid
        where t.typnamespace {HERE} and t.typelem = 0""",
    "statistics": f"""
        select s.stxname, pg_get_statisticsobjdef(s.oid), s.stxkeys::text from pg_statistic_ext s where s.stxnamespace {HERE}""",
    "publication": """
        select p.pubname || ' ' || p.tablename, p.attnames::text, p.rowfilter
        from pg_publication_tables p where p.schemaname = 'stepwell'""",
    "default privileges": f"""
        select pg_get_userbyid(d.defaclrole) || ' ' || d.defaclobjtype::text, d.defaclacl::text
        from pg_default_acl d where d.defaclnamespace {HERE}""",
}  # fmt: skip


def catalog(connection: psycopg.Connection[TupleRow]) -> Catalog:
    """Return everything that there is in the schema, by sort and name."""
    found: Catalog = {}
    for sort, query in QUERIES.items():
        for name, *rest in connection.execute(query.encode()).fetchall():
            assert (sort, name) not in found, "two things of one name would hide each other"
            found[sort, name] = tuple(_sorted_acl(value) for value in rest)
    return found


def differences(upgraded: Catalog, fresh: Catalog) -> list[str]:
    """Return in which things two schemas differ, one line each; empty when they are equal."""
    lines = []
    for thing in sorted(upgraded.keys() | fresh.keys()):
        sort, name = thing
        if thing not in fresh:
            lines.append(f"{sort} {name}: only after the migrations, not in schema.sql")
        elif thing not in upgraded:
            lines.append(f"{sort} {name}: only in schema.sql, no migration makes it")
        elif upgraded[thing] != fresh[thing]:
            pairs = [
                f"{a!r} instead of {b!r}"
                for a, b in zip(upgraded[thing], fresh[thing], strict=True)
                if a != b
            ]
            lines.append(f"{sort} {name}: the migrations make {'; '.join(pairs)}")
    return lines


def _sorted_acl(value: Any) -> Any:
    """Return a list of privileges in an order of its own: they are listed as they were granted."""
    if isinstance(value, str) and value.startswith("{") and "=" in value and "/" in value:
        return "{" + ",".join(sorted(value[1:-1].split(","))) + "}"
    return value
