//! Errors as RFC 9457 problem documents.

use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use kds_client::api::{Problem, ProblemKind};
use quorum::answer::{Receipt, RecordAnswer};

/// An error on its way to a client.
#[derive(Debug)]
pub struct ApiError {
    kind: ProblemKind,
    detail: String,
    receipt: Option<Box<Receipt>>,
    answer: Option<Box<RecordAnswer>>,
    retry_after: u64,
}

impl ApiError {
    /// What happened, and what to do about it.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), receipt: None, answer: None, retry_after: 1 }
    }
    /// With the proof that the request was executed and refused.
    pub fn with_receipt(self, receipt: Receipt) -> Self {
        Self { receipt: Some(Box::new(receipt)), ..self }
    }
    /// With the proof that there is no such record.
    pub fn with_answer(self, answer: RecordAnswer) -> Self {
        Self { answer: Some(Box::new(answer)), ..self }
    }
    /// After how many seconds to try again, instead of one.
    pub fn with_retry_after(self, seconds: u64) -> Self {
        Self { retry_after: seconds, ..self }
    }
    /// A defect: logged in full, told in general.
    pub fn internal(error: &anyhow::Error) -> Self {
        tracing::error!(error = %format!("{error:#}"), "internal error");
        Self::new(ProblemKind::Internal, "this server has a problem of its own: try another one")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let problem = Problem {
            kind: self.kind.uri().into(),
            title: self.kind.title().into(),
            status: status.as_u16(),
            detail: self.detail,
            receipt: self.receipt,
            answer: self.answer,
        };
        let mut response = super::json_with(status, "application/problem+json", &problem);
        if matches!(self.kind, ProblemKind::TooMany | ProblemKind::NotReady) {
            response.headers_mut().insert("retry-after", HeaderValue::from(self.retry_after));
        }
        response
    }
}
