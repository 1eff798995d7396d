-- The business tables of the demo: a CRM in the same Postgres, in a schema of its own.

create schema if not exists crm;

-- Deliberately without a unique constraint on lead_id: if a lead were saved twice, it would be here twice.
create table if not exists crm.leads (
    id           bigint generated always as identity primary key,
    lead_id      bigint not null,
    name         text not null,
    email        text not null,
    phone        text,
    company      text,
    source       text not null,
    locale       text not null,
    country      text not null,
    signed_up_at timestamptz not null,
    saved_at     timestamptz not null default clock_timestamp()
);
