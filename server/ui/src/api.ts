// What the node says of itself, as JSON: the shapes of server/src/http/api.rs.

export interface Waiting {
  count: number;
  p50_ms: number | null;
  p95_ms: number | null;
}

export interface Traffic {
  seconds: number;
  requests: number;
  prompt_tokens: number;
  hit_tokens: number;
  warm: Waiting;
  cold: Waiting;
}

export interface Kept {
  class: string;
  objects: number;
  bytes: number;
  ages: { up_to_s: number | null; objects: number; bytes: number }[];
}

export interface Session {
  tenant: string;
  name: string;
  user: string;
  tokens: number;
  resume_tokens: number;
  bytes: number;
  remaining_s: number;
}

export interface Tenant {
  tenant: string;
  stored_bytes: number;
  stored_bytes_limit: number | null;
  leased_bytes: number;
  sessions: number;
  requests: number;
  prompt_tokens: number;
  hit_tokens: number;
  cost: string | null;
  saved: string | null;
}

export interface Warmup {
  job: string;
  tenant: string;
  state: string;
  prompts: number;
  prompts_done: number;
  tokens: number;
  tokens_done: number;
  reason: string;
}

export interface Happening {
  at_ms: number;
  kind: "refusal" | "damage";
  who: string;
  what: string;
}

export interface Overview {
  now_ms: number;
  node: { version: string; model: string | null; started_ms: number; io: string };
  traffic: { hour: Traffic; all: Traffic };
  store: {
    objects: number;
    bytes: number;
    disk_bytes: number;
    limit_bytes: number | null;
    free_bytes: number | null;
    leased_bytes: number;
    evicted: number;
    expired: number;
  };
  kept: Kept[];
  sessions: Session[];
  tenants: Tenant[];
  currency: string | null;
  warmups: Warmup[];
  drive: {
    read_bytes: number;
    written_bytes: number;
    ever_written_bytes: number;
    ever_accepted_bytes: number;
    per_day_bytes: number | null;
    device: string | null;
    device_written_bytes: number | null;
  };
  trouble: {
    damaged: number;
    refused: number;
    put_errors: number;
    breaker_trips: number;
    suspect_segments: number;
  };
  recent: Happening[];
}

// Figures of one step of time.
export interface Point {
  at_ms: number;
  requests: number;
  prompt_tokens: number;
  hit_tokens: number;
  warm_ms: number | null;
  cold_ms: number | null;
}

export interface History {
  step_s: number;
  points: Point[];
}

export interface Realm {
  id: string;
  owner: string;
  model: string;
  bytes: number;
}

// A run of blocks without a fork.
export interface Run {
  name: string;
  from: number;
  to: number;
  bytes: number;
  idle_s: number;
  held: boolean;
  states: number;
  hidden: number;
  next: Run[];
}

export interface Forest {
  tokens: number;
  truncated: boolean;
  roots: Run[];
}

const TOKEN = "esker-token";

export class Denied extends Error {}

// Asks the node; where it wants to know who asks, with the token that was typed in.
export async function ask<T>(path: string): Promise<T> {
  const token = sessionStorage.getItem(TOKEN);
  const headers: Record<string, string> = token ? { authorization: `Bearer ${token}` } : {};
  const reply = await fetch(path, { headers });
  if (reply.status === 401 || reply.status === 403) {
    const body = await reply.json().catch(() => null);
    throw new Denied(body?.error?.message ?? "not allowed");
  }
  if (!reply.ok) throw new Error(`${path}: ${reply.status}`);
  return reply.json();
}

export function useToken(token: string) {
  sessionStorage.setItem(TOKEN, token);
}
